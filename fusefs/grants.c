/* Opens that are answered without Python.
 *
 * An open for reading of an inode that has a grant is answered here, and so is its release: through
 * Python the two cost ten times as much. Who gets a grant, Python decides, once for many opens (grants.py).
 * The table of grants lies in memory that all processes share, a 64-bit word for each inode, so that each
 * step is one compare-and-swap. Which inodes were opened is kept for Python, which asks every so often:
 * drained().
 */
#define _GNU_SOURCE
#include "channel.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>

#define GRANTED_BIT (UINT64_C(1) << 63) /* Of a file handle that was given out here, as in filesystem.py. */
#define OPEN_NOFLUSH (UINT32_C(1) << 5) /* FOPEN_NOFLUSH, kernel 5.16. */
/* A word of the table: the inode above, then whether the grant was withdrawn, then how many have it open. */
#define WITHDRAWN (UINT64_C(1) << 23)
#define COUNT_MAX (WITHDRAWN - 1)
#define INODE_SHIFT 24
#define GRANTED_INODE_MAX ((UINT64_C(1) << (64 - INODE_SHIFT)) - 1)
#define OPENED_MAX 8192

/* Of the table, any process's. */
struct grants {
	uint64_t *words;
	uint64_t count; /* A power of two. */
};

/* What follows is this process's. Answers may come from another thread than Python's: *lock* is for
 * what `drained` takes. */
static struct grants answered_from; /* None: {0}. */
static Py_buffer answered_view;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
	uint64_t inode;
	struct timespec at;
} opened[OPENED_MAX];
static unsigned opened_count;
static uint64_t answered_count;

static uint64_t *word_of(struct grants grants, uint64_t inode)
{
	return &grants.words[(inode * UINT64_C(0x9E3779B97F4A7C15) >> 20) & (grants.count - 1)];
}

static int is_for(uint64_t word, uint64_t inode)
{
	return inode && word >> INODE_SHIFT == inode;
}

static int swap(uint64_t *place, uint64_t *expected, uint64_t wanted)
{
	return __atomic_compare_exchange_n(place, expected, wanted, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
}

/* Count one more open of an inode that has a grant; return whether it has. */
static int open_granted(struct grants grants, uint64_t inode)
{
	uint64_t *place = word_of(grants, inode), word = __atomic_load_n(place, __ATOMIC_SEQ_CST);

	do {
		if (!is_for(word, inode) || (word & WITHDRAWN) || (word & COUNT_MAX) == COUNT_MAX)
			return 0;
	} while (!swap(place, &word, word + 1));
	return 1;
}

/* Count one open less. *even_withdrawn*: else nothing happens to a grant that was withdrawn. */
static int close_granted(struct grants grants, uint64_t inode, int even_withdrawn)
{
	uint64_t *place = word_of(grants, inode), word = __atomic_load_n(place, __ATOMIC_SEQ_CST), wanted;

	do {
		if (!is_for(word, inode) || !(word & COUNT_MAX) || ((word & WITHDRAWN) && !even_withdrawn))
			return 0;
		wanted = word - 1;
		if ((wanted & WITHDRAWN) && !(wanted & COUNT_MAX))
			wanted = 0;
	} while (!swap(place, &word, wanted));
	return 1;
}

/* It fails where an inode that is open has the place. */
static uint64_t give_grant(struct grants grants, uint64_t inode)
{
	uint64_t *place = word_of(grants, inode), word = __atomic_load_n(place, __ATOMIC_SEQ_CST);
	uint64_t wanted;

	if (!inode || inode > GRANTED_INODE_MAX)
		return 0;
	do {
		if (!is_for(word, inode) && (word & COUNT_MAX))
			return 0;
		wanted = is_for(word, inode) ? word & ~WITHDRAWN : inode << INODE_SHIFT;
	} while (!swap(place, &word, wanted));
	return 1;
}

static uint64_t granted_count(struct grants grants, uint64_t inode)
{
	uint64_t word = __atomic_load_n(word_of(grants, inode), __ATOMIC_SEQ_CST);

	return is_for(word, inode) ? word & COUNT_MAX : 0;
}

/* Return how many have it open still: their releases come to Python. */
static uint64_t withdraw_grant(struct grants grants, uint64_t inode)
{
	uint64_t *place = word_of(grants, inode), word = __atomic_load_n(place, __ATOMIC_SEQ_CST), wanted;

	do {
		if (!is_for(word, inode))
			return 0;
		wanted = (word & COUNT_MAX) ? word | WITHDRAWN : 0;
	} while (!swap(place, &word, wanted));
	return word & COUNT_MAX;
}

/* Return whether it was sent: not where nobody waits for it any more. */
static int answer(int device, uint64_t unique, const void *body, size_t length)
{
	struct fuse_out_header out = {(uint32_t)(sizeof(out) + length), 0, unique};
	struct iovec pieces[] = {{&out, sizeof(out)}, {(void *)body, length}};

	return writev(device, pieces, length ? 2 : 1) >= 0;
}

static void note_answer(void)
{
	pthread_mutex_lock(&lock);
	answered_count++;
	pthread_mutex_unlock(&lock);
}

/* Take a place in what Python is told; return whether there is one. */
static int note_open(uint64_t inode)
{
	int has_room;

	pthread_mutex_lock(&lock);
	has_room = opened_count < OPENED_MAX;
	if (has_room) {
		answered_count++;
		opened[opened_count].inode = inode;
		clock_gettime(CLOCK_REALTIME, &opened[opened_count++].at);
	}
	pthread_mutex_unlock(&lock);
	return has_room;
}

static int answer_open(int device, const struct fuse_in_header *in)
{
	struct fuse_open_in arg;
	struct open_out out = {in->nodeid | GRANTED_BIT, FOPEN_KEEP_CACHE | OPEN_NOFLUSH, 0};

	memcpy(&arg, in + 1, sizeof(arg));
	if ((arg.flags & (O_ACCMODE | O_TRUNC | O_DIRECT)) != O_RDONLY || !open_granted(answered_from, in->nodeid))
		return 0;
	if (!note_open(in->nodeid)) {
		close_granted(answered_from, in->nodeid, 1);
		return 0;
	}
	if (!answer(device, in->unique, &out, sizeof(out)))
		close_granted(answered_from, in->nodeid, 1);
	return 1;
}

/* One that is sent again may have been counted by a process that died since. A count that is one too
 * many keeps a file longer than needed, one that is too few would take it from its readers. */
static int answer_release(int device, const struct fuse_in_header *in)
{
	struct fuse_release_in arg;

	memcpy(&arg, in + 1, sizeof(arg));
	if (!(arg.fh & GRANTED_BIT))
		return 0;
	if (!(in->unique & UNIQUE_RESEND) && !close_granted(answered_from, in->nodeid, 0))
		return 0;
	answer(device, in->unique, NULL, 0);
	note_answer();
	return 1;
}

int answer_granted(int device, const void *request, size_t length)
{
	const struct fuse_in_header *in = request;

	if (!answered_from.words || length < sizeof(*in))
		return 0;
	if (in->opcode == FUSE_OPEN && length >= sizeof(*in) + sizeof(struct fuse_open_in))
		return !(in->unique & UNIQUE_RESEND) && answer_open(device, in);
	if (in->opcode == FUSE_RELEASE && length >= sizeof(*in) + sizeof(struct fuse_release_in))
		return answer_release(device, in);
	return 0;
}

/* What Python calls. */

typedef uint64_t verb(struct grants grants, uint64_t inode);

/* Take the table; return 0, or -1 with an exception set. The caller releases the view. */
static int parse_table(Py_buffer *view, struct grants *grants)
{
	grants->words = view->buf;
	grants->count = (uint64_t)view->len / sizeof(uint64_t);
	if (grants->count && !(grants->count & (grants->count - 1)) && !((uintptr_t)view->buf & 7))
		return 0;
	PyBuffer_Release(view);
	PyErr_SetString(PyExc_ValueError, "a table of grants has a power of two of 64-bit words");
	return -1;
}

/* Call *verb* with (table, inode); return the number that it returns. */
static PyObject *call(PyObject *args, verb *verb)
{
	Py_buffer view;
	struct grants grants;
	unsigned long long inode;
	uint64_t result;

	if (!PyArg_ParseTuple(args, "w*K", &view, &inode) || parse_table(&view, &grants) < 0)
		return NULL;
	result = verb(grants, inode);
	PyBuffer_Release(&view);
	return PyLong_FromUnsignedLongLong(result);
}

static uint64_t close_any(struct grants grants, uint64_t inode)
{
	return (uint64_t)close_granted(grants, inode, 1);
}

static PyObject *give(PyObject *self, PyObject *args)
{
	(void)self;
	return call(args, give_grant);
}

static PyObject *withdraw(PyObject *self, PyObject *args)
{
	(void)self;
	return call(args, withdraw_grant);
}

static PyObject *count_open(PyObject *self, PyObject *args)
{
	(void)self;
	return call(args, granted_count);
}

static PyObject *count_closed(PyObject *self, PyObject *args)
{
	(void)self;
	return call(args, close_any);
}

static PyObject *answer_from(PyObject *self, PyObject *args)
{
	Py_buffer view;
	struct grants grants;

	(void)self;
	if (!PyArg_ParseTuple(args, "w*", &view) || parse_table(&view, &grants) < 0)
		return NULL;
	if (answered_from.words)
		PyBuffer_Release(&answered_view);
	answered_view = view;
	answered_from = grants;
	Py_RETURN_NONE;
}

static PyObject *drained(PyObject *self, PyObject *unused)
{
	static struct {
		uint64_t inode;
		struct timespec at;
	} taken[OPENED_MAX];
	unsigned count;
	uint64_t answered;
	PyObject *list, *pair;

	(void)self, (void)unused;
	pthread_mutex_lock(&lock);
	count = opened_count, answered = answered_count;
	memcpy(taken, opened, count * sizeof(opened[0]));
	opened_count = 0, answered_count = 0;
	pthread_mutex_unlock(&lock);
	list = PyList_New(count);
	for (unsigned i = 0; list && i < count; i++) {
		double at_s = (double)taken[i].at.tv_sec + 1e-9 * (double)taken[i].at.tv_nsec;

		pair = Py_BuildValue("(Kd)", (unsigned long long)taken[i].inode, at_s);
		if (!pair)
			Py_CLEAR(list);
		else
			PyList_SET_ITEM(list, i, pair);
	}
	return list ? Py_BuildValue("(KN)", (unsigned long long)answered, list) : NULL;
}

PyMethodDef grants_methods[] = {
	{"give", give, METH_VARARGS,
	 "give(table, inode): opens of it for reading may be answered by the channel from now on.\n\n"
	 "Return 0 where its place in the table is taken by another that is open."},
	{"withdraw", withdraw, METH_VARARGS,
	 "withdraw(table, inode): no more of them; return how many have it open, whose releases Python gets."},
	{"count_open", count_open, METH_VARARGS,
	 "count_open(table, inode): return how many opens that the channel answered are not released."},
	{"count_closed", count_closed, METH_VARARGS,
	 "count_closed(table, inode): one of them was released; return 0 where there was none."},
	{"answer_from", answer_from, METH_VARARGS,
	 "answer_from(table): have this process answer what has a grant in it. Kept for ever."},
	{"drained", drained, METH_NOARGS,
	 "Return how many requests were answered here since the last call, and the opens among them.\n\n"
	 "These are pairs (inode, seconds since the epoch) in the order of the opens."},
	{0},
};
