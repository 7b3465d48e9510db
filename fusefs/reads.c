/* The bytes of cached files, brought to the kernel without the interpreter lock.
 *
 * Python decides: direct.py looks up which file holds what a READ asks for, and what the checksums of its
 * blocks are. read_file() does the rest. What is in the page cache is answered in the call itself; for the
 * disk one of a few threads waits. A READ that ends otherwise (the file is gone or was punched, a checksum
 * differs, the disk fails) is kept for Python, which answers it the usual way: failed_reads().
 *
 * The checksums are those of xxhash's library, found at run time: any Debian has it.
 *
 * All state is the process's own, a worker's. Called with the interpreter lock, on the thread that receives requests.
 */
#define _GNU_SOURCE
#include "channel.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/uio.h>
#include <unistd.h>

#define BLOCK_BYTES (UINT64_C(16) << 10) /* As in model.py. */
#define BLOCKS_MAX 80			 /* A READ of 1 MiB touches 65. */
#define BUFFER_BYTES (BLOCKS_MAX * BLOCK_BYTES)
#define THREADS_MAX 8
#define JOBS_MAX 64
#define HASH_OF_NOTHING UINT64_C(0x2D06800538D394C2)

struct job {
	uint64_t unique, handle, offset, length; /* What the kernel asks for, */
	uint64_t start, end;			 /* and the blocks of the file that hold it. */
	int fd;
	uint64_t checksums[BLOCKS_MAX];
};

enum outcome { ANSWERED, WOULD_WAIT, FAILED };

static uint64_t (*hash)(const void *, size_t);
static int device_fd = -1;
static int failed_event = -1;
static char *own_buffer; /* Of the thread that receives. */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t waiting = PTHREAD_COND_INITIALIZER;
static struct job jobs[JOBS_MAX]; /* A ring. */
static unsigned first_job, job_count, idle_count, thread_count;
static struct failed {
	uint64_t unique, handle, offset, length;
} failed[JOBS_MAX + THREADS_MAX];
static unsigned failed_count;

static int has_good_checksums(const struct job *job, const char *buffer)
{
	uint64_t size = job->end - job->start;

	for (uint64_t i = 0; i * BLOCK_BYTES < size; i++) {
		uint64_t left = size - i * BLOCK_BYTES;

		if (hash(buffer + i * BLOCK_BYTES, left < BLOCK_BYTES ? left : BLOCK_BYTES) != job->checksums[i])
			return 0;
	}
	return 1;
}

static void send_bytes(const struct job *job, char *bytes)
{
	struct fuse_out_header out = {(uint32_t)(sizeof(out) + job->length), 0, job->unique};
	struct iovec pieces[] = {{&out, sizeof(out)}, {bytes, job->length}};

	if (writev(device_fd, pieces, 2) < 0)
		return; /* Nobody waits for it any more. */
}

/* *flags*: of preadv2(2). With RWF_NOWAIT it is all there, or would be waited for. */
static enum outcome answer_read(const struct job *job, char *buffer, int flags)
{
	uint64_t size = job->end - job->start, got = 0;

	while (got < size) {
		struct iovec piece = {buffer + got, size - got};
		ssize_t count = preadv2(job->fd, &piece, 1, (off_t)(job->start + got), flags);

		if (count < 0 && errno == EINTR)
			continue;
		if (flags & RWF_NOWAIT && count != (ssize_t)size)
			return WOULD_WAIT;
		if (count <= 0)
			return FAILED;
		got += (uint64_t)count;
	}
	if (!has_good_checksums(job, buffer))
		return FAILED;
	send_bytes(job, buffer + (job->offset - job->start));
	return ANSWERED;
}

static void note_failure(const struct job *job)
{
	pthread_mutex_lock(&lock);
	/* There is room: each is of a job that was taken, and none is while one is kept. */
	failed[failed_count++] = (struct failed){job->unique, job->handle, job->offset, job->length};
	pthread_mutex_unlock(&lock);
	eventfd_write(failed_event, 1);
}

static void *work(void *buffer)
{
	for (;;) {
		struct job job;

		pthread_mutex_lock(&lock);
		idle_count++;
		while (!job_count)
			pthread_cond_wait(&waiting, &lock);
		idle_count--;
		job = jobs[first_job];
		first_job = (first_job + 1) % JOBS_MAX;
		job_count--;
		pthread_mutex_unlock(&lock);
		if (answer_read(&job, buffer, 0) != ANSWERED)
			note_failure(&job);
		close(job.fd);
	}
	return NULL;
}

/* Return whether there is one more thread. */
static int start_thread(void)
{
	void *buffer = malloc(BUFFER_BYTES);
	pthread_t thread;
	sigset_t all, before;
	int code;

	if (!buffer)
		return 0;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before); /* Signals are Python's. */
	code = pthread_create(&thread, NULL, work, buffer);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (code) {
		free(buffer);
		return 0;
	}
	pthread_detach(thread);
	return 1;
}

/* Return whether a thread will do it. */
static int hand_over(const struct job *job)
{
	int is_taken = 0;

	pthread_mutex_lock(&lock);
	if (job_count >= idle_count && thread_count < THREADS_MAX)
		thread_count += start_thread();
	if (thread_count && job_count + failed_count < JOBS_MAX) {
		jobs[(first_job + job_count++) % JOBS_MAX] = *job;
		is_taken = 1;
	}
	pthread_mutex_unlock(&lock);
	if (is_taken)
		pthread_cond_signal(&waiting);
	return is_taken;
}

/* Return whether it is answered, or a thread will answer it. */
static int serve(struct job *job, const char *path, int is_memory)
{
	enum outcome outcome;

	job->fd = open(path, O_RDONLY | O_CLOEXEC);
	if (job->fd < 0)
		return 0;
	outcome = answer_read(job, own_buffer, is_memory ? 0 : RWF_NOWAIT);
	if (outcome == WOULD_WAIT && hand_over(job))
		return 1;
	close(job->fd);
	return outcome == ANSWERED;
}

static PyObject *read_file(PyObject *self, PyObject *args)
{
	struct job job;
	unsigned long long unique, handle, offset, length, start, end;
	PyObject *path;
	Py_buffer checksums;
	int is_memory, is_good, is_taken = 0;

	(void)self;
	if (!PyArg_ParseTuple(args, "KKKKO&KKy*p", &unique, &handle, &offset, &length, PyUnicode_FSConverter, &path,
			      &start, &end, &checksums, &is_memory))
		return NULL;
	is_good = hash && device_fd >= 0 && own_buffer && start < end && end - start <= BUFFER_BYTES &&
		  start <= offset && length && length <= end - offset && offset < end &&
		  (uint64_t)checksums.len == (end - start + BLOCK_BYTES - 1) / BLOCK_BYTES * sizeof(uint64_t);
	if (is_good) {
		job.unique = unique, job.handle = handle, job.offset = offset, job.length = length;
		job.start = start, job.end = end;
		memcpy(job.checksums, checksums.buf, (size_t)checksums.len);
		Py_BEGIN_ALLOW_THREADS
		is_taken = serve(&job, PyBytes_AS_STRING(path), is_memory);
		Py_END_ALLOW_THREADS
	}
	PyBuffer_Release(&checksums);
	Py_DECREF(path);
	return PyBool_FromLong(is_taken);
}

static PyObject *start_reads(PyObject *self, PyObject *unused)
{
	void *library = dlopen("libxxhash.so.0", RTLD_NOW | RTLD_LOCAL);
	void *found = library ? dlsym(library, "XXH3_64bits") : NULL;

	(void)self, (void)unused;
	memcpy(&hash, &found, sizeof(hash));
	if (!hash || hash("", 0) != HASH_OF_NOTHING) {
		hash = NULL;
		PyErr_SetString(PyExc_OSError, "libxxhash.so.0 of version 0.8 or later is not there");
		return NULL;
	}
	if (!own_buffer)
		own_buffer = malloc(BUFFER_BYTES);
	if (!own_buffer)
		return PyErr_NoMemory();
	if (failed_event < 0)
		failed_event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
	return failed_event < 0 ? PyErr_SetFromErrno(PyExc_OSError) : PyLong_FromLong(failed_event);
}

static PyObject *failed_reads(PyObject *self, PyObject *unused)
{
	struct failed taken[JOBS_MAX + THREADS_MAX];
	unsigned count;
	eventfd_t events;
	PyObject *list, *read;

	(void)self, (void)unused;
	pthread_mutex_lock(&lock);
	count = failed_count;
	memcpy(taken, failed, count * sizeof(failed[0]));
	failed_count = 0;
	eventfd_read(failed_event, &events);
	pthread_mutex_unlock(&lock);
	list = PyList_New(count);
	for (unsigned i = 0; list && i < count; i++) {
		read = Py_BuildValue("(KKKK)", (unsigned long long)taken[i].unique,
				     (unsigned long long)taken[i].handle, (unsigned long long)taken[i].offset,
				     (unsigned long long)taken[i].length);
		if (!read)
			Py_CLEAR(list);
		else
			PyList_SET_ITEM(list, i, read);
	}
	return list;
}

void reads_on(int device)
{
	device_fd = device;
}

PyMethodDef reads_methods[] = {
	{"start_reads", start_reads, METH_NOARGS,
	 "Return a descriptor that is readable while failed_reads() has something. Call it after the fork.\n\n"
	 "Raises OSError where there is no libxxhash."},
	{"read_file", read_file, METH_VARARGS,
	 "read_file(unique, handle, offset, length, path, start, end, checksums, is_memory) -> bool\n\n"
	 "Answer the READ *unique* with *length* bytes at *offset* of the file at *path*, now or soon. *start* to\n"
	 "*end*: the whole blocks that hold them (the last of a file may be short); *checksums*: theirs, 8 bytes\n"
	 "each. False: it was not answered, and has to be. Of one that fails later failed_reads() tells."},
	{"failed_reads", failed_reads, METH_NOARGS,
	 "Return what read_file() took and could not do: (unique, handle, offset, length), to be answered still."},
	{0},
};
