/* Counts of opens, for two cases: nobody had the file open, or nobody will have.
 *
 * They are those of cache/opens.py, which says how they are kept: here is the same change, with the same lock. A
 * process has one such lock for all of its threads, and none of them is between `_lock` and `_unlock` while *is_held*
 * is 0 and we have the interpreter lock.
 *
 * Called with the interpreter lock, by the main thread.
 */
#define _GNU_SOURCE
#include "channel.h"

#include <fcntl.h>

/* Of the OpenTable: a bucket's words, an entry's value. */
enum { PLACE, VALUE, KEY, REQUEST, EXCESS };
#define WRITERS_SHIFT 20
#define WRITERS_MAX ((UINT64_C(1) << 12) - 1)
#define ANSWERED_CACHED (UINT64_C(1) << 63)

static Py_buffer opens_view, is_held_view; /* The first is shared with other processes. */
static uint64_t *opens;
static int opens_fd;
static unsigned long long requests, first_bucket, buckets, bucket_words, keys, slots;

static uint64_t bucket_of(uint64_t inode)
{
	return first_bucket + (inode ^ inode >> 12) % buckets * bucket_words;
}

static int set_lock(uint64_t bucket, short kind)
{
	struct flock lock = {.l_type = kind, .l_whence = SEEK_SET, .l_start = (off_t)bucket, .l_len = 1};

	return fcntl(opens_fd, F_SETLK, &lock) == 0;
}

/* Return whether it is locked, which nobody is waited for; a change that was begun is finished by Python. */
static int lock(uint64_t bucket)
{
	if (*(const char *)is_held_view.buf || !set_lock(bucket, F_WRLCK))
		return 0;
	if (!opens[bucket + PLACE])
		return 1;
	set_lock(bucket, F_UNLCK);
	return 0;
}

static void unlock(uint64_t bucket)
{
	set_lock(bucket, F_UNLCK);
}

/* Return where the value of *key*'s entry is, counted from the bucket; for key 0, where one is free; else 0. */
static uint64_t place_of(uint64_t bucket, uint64_t key)
{
	for (uint64_t slot = 0; slot < slots; slot++)
		if (opens[bucket + keys + slot] == key)
			return keys + slots + slot;
	return 0;
}

static int was_counted(uint64_t request)
{
	return request && opens[(request >> 1) % requests] == request;
}

static void store(uint64_t place, uint64_t value)
{
	__atomic_store_n(&opens[place], value, __ATOMIC_SEQ_CST);
}

/* In three steps, as opens.py does it: whoever comes next finishes what a process that dies has begun. */
static void change(uint64_t bucket, uint64_t place, uint64_t value, uint64_t key, uint64_t request)
{
	store(bucket + VALUE, value);
	store(bucket + KEY, key);
	store(bucket + REQUEST, request);
	store(bucket + PLACE, place);
	store(bucket + place, value);
	store(bucket + place - slots, value ? key : 0);
	if (request)
		store((request >> 1) % requests, request);
	store(bucket + PLACE, 0);
}

int count_first(uint64_t inode, uint64_t request, int answered_cached)
{
	uint64_t bucket = bucket_of(inode), place = 0;

	if (!lock(bucket))
		return 0;
	if (!opens[bucket + EXCESS] && !was_counted(request) && !place_of(bucket, inode))
		place = place_of(bucket, 0);
	if (place)
		change(bucket, place, (UINT64_C(1) << WRITERS_SHIFT) | (answered_cached ? ANSWERED_CACHED : 0), inode,
		       request);
	unlock(bucket);
	return place != 0;
}

int count_last(uint64_t inode, uint64_t request)
{
	uint64_t bucket = bucket_of(inode), place;

	if (!lock(bucket))
		return 0;
	place = place_of(bucket, inode);
	if (opens[bucket + EXCESS] || was_counted(request) || !place ||
	    (opens[bucket + place] & ~ANSWERED_CACHED) != UINT64_C(1) << WRITERS_SHIFT)
		place = 0;
	if (place)
		change(bucket, place, 0, inode, request);
	unlock(bucket);
	return place != 0;
}

int has_writers(uint64_t inode)
{
	uint64_t bucket = bucket_of(inode), place = place_of(bucket, inode);

	return place && (opens[bucket + place] >> WRITERS_SHIFT & WRITERS_MAX);
}

int hold_writers(uint64_t inode)
{
	if (!lock(bucket_of(inode)))
		return 0;
	if (has_writers(inode))
		return 1;
	unlock(bucket_of(inode));
	return 0;
}

void let_go_writers(uint64_t inode)
{
	unlock(bucket_of(inode));
}

/* What Python calls */

static PyObject *set_up_counted(PyObject *self, PyObject *args)
{
	(void)self;
	if (opens) { /* For tests, which set it up several times. */
		opens = NULL;
		PyBuffer_Release(&opens_view), PyBuffer_Release(&is_held_view);
	}
	if (!PyArg_ParseTuple(args, "w*iw*(KKKKKK)", &opens_view, &opens_fd, &is_held_view, &requests, &first_bucket,
			      &buckets, &bucket_words, &keys, &slots))
		return NULL;
	opens = opens_view.buf;
	Py_RETURN_NONE;
}

PyMethodDef counted_methods[] = {
	{"set_up_counted", set_up_counted, METH_VARARGS,
	 "set_up_counted(opens, fd, is_held, layout): where opens are counted. Before set_up_written()."},
	{0},
};
