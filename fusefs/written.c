/* Files that this process has made and that are open for writing since: most of what follows, without Python. Of
 * files that others made, or that are written anew, the WRITEs, once Python has seen the first.
 *
 * Who unpacks an archive sends, after CREATE, one WRITE, three SETATTR with a GETATTR in between, and RELEASE
 * for each file. Each of these takes Python 40 to 80 us, most of it for finding out again what CREATE knew:
 * which staging file it is, who owns it, that somebody writes to it. So written.py notes that here.
 *
 * What is noted of a file holds until the mover changes the file's node. The mover then changes the file's
 * cell of *generations* (cache/generations.py) before anybody hears of the change, and the note is dropped.
 * As in writing.py what belongs to the file's staging file alone is done here, and what is anything else is
 * left to Python: nothing has been done then that would be wrong twice.
 *
 * Called with the interpreter lock, by the main thread. Wire format: linux/fuse.h.
 */
#define _GNU_SOURCE
#include "channel.h"

#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define FILES_MAX 256 /* By the lowest bits of the inode: inodes are given out in order. */
#define WRITING_BIT (UINT64_C(1) << 59) /* Of a file handle, as in filesystem.py. */
#define WRITE_BYTES_MAX (1 << 20) /* What the kernel sends at most. */
/* More than so many bytes, as in writing.py, are written here only while memory takes them, 0.2 ms for a MiB: when the
 * kernel has writers wait for the disk, other requests would wait for this thread. After a write that waited, and
 * took longer than SLOW_NS, Python's threads do those of the next SLOW_FOR_NS. */
#define SMALL_BYTES_MAX ((64 << 10) - 1)
#define SLOW_NS 5000000L
#define SLOW_FOR_NS INT64_C(10000000000)
#define OBJECT_BYTES_MAX (INT64_C(5) << 40) /* As in model.py. */
#define BLOCK_BYTES (1 << 17) /* As in replies.py. */
#define OWN_MODE 0600 /* Of a staging file that says nothing of the mode, as in staging.py. */
#define SETS (FATTR_MODE | FATTR_UID | FATTR_GID | FATTR_MTIME)

struct file {
	uint64_t inode; /* 0: none. */
	int fd;
	int is_others; /* Made by another worker, or before: only its WRITEs are answered. */
	uint32_t mode, uid, gid; /* Of the node. */
	int64_t ctime_ns;
	uint64_t generation, epoch;
};

static struct file files[FILES_MAX];
static int64_t slow_until_ns; /* For the main thread. */

/* Memory that is shared with other processes. */
static struct {
	Py_buffer generations, counters, budget;
} views;
static uint64_t *generations, *counters, *budget;
static int is_set_up;
static unsigned long long width, own_row, requests_place, written_place, generation_cells;
static unsigned long long attributes_valid_s;
static PyObject *closed;

/* What is noted */

static int is_true_still(const struct file *file)
{
	return __atomic_load_n(&generations[file->inode % generation_cells], __ATOMIC_SEQ_CST) == file->generation &&
	       __atomic_load_n(&generations[generation_cells], __ATOMIC_SEQ_CST) == file->epoch;
}

static void drop(struct file *file)
{
	if (file->inode)
		close(file->fd);
	file->inode = 0;
}

static struct file *file_of(uint64_t inode)
{
	struct file *file = &files[inode % FILES_MAX];

	if (!inode || file->inode != inode)
		return NULL;
	if (is_true_still(file))
		return file;
	drop(file);
	return NULL;
}

/* Attributes */

static int64_t as_ns(struct timespec at)
{
	return (int64_t)at.tv_sec * 1000000000 + at.tv_nsec;
}

static uint32_t mode_of(const struct file *file, const struct stat *status)
{
	uint32_t said = status->st_mode & 07777;

	return said == OWN_MODE ? file->mode : said;
}

static struct fuse_attr shown(const struct file *file, const struct stat *status)
{
	int64_t ctime_ns = as_ns(status->st_ctim);

	if (ctime_ns < file->ctime_ns)
		ctime_ns = file->ctime_ns;
	return (struct fuse_attr){
		.ino = file->inode,
		.size = (uint64_t)status->st_size,
		.blocks = (uint64_t)status->st_blocks,
		.atime = (uint64_t)status->st_atim.tv_sec,
		.mtime = (uint64_t)status->st_mtim.tv_sec,
		.ctime = (uint64_t)(ctime_ns / 1000000000),
		.atimensec = (uint32_t)status->st_atim.tv_nsec,
		.mtimensec = (uint32_t)status->st_mtim.tv_nsec,
		.ctimensec = (uint32_t)(ctime_ns % 1000000000),
		.mode = S_IFREG | mode_of(file, status),
		.nlink = 1,
		.uid = file->uid,
		.gid = file->gid,
		.blksize = BLOCK_BYTES,
	};
}

static int reply_attributes(int device, uint64_t unique, const struct file *file)
{
	struct fuse_attr_out out = {.attr_valid = attributes_valid_s};
	struct stat status;

	if (fstat(file->fd, &status) < 0)
		return 0;
	out.attr = shown(file, &status);
	send_reply(device, unique, 0, &out, sizeof(out));
	return 1;
}

/* A mode that a staging file may have, as in staging.py: we can still use it, and it runs for nobody else. */
static int may_say(uint32_t mode)
{
	return mode != OWN_MODE && (mode & OWN_MODE) == OWN_MODE && !(mode & ~0777u);
}

/* Do what `Writing._set_while_written` does; return whether that is all there is to do. */
static int set_while_written(const struct file *file, const struct fuse_setattr_in *arg)
{
	struct timespec times[2];
	struct stat status;

	if (fstat(file->fd, &status) < 0)
		return 0;
	if (((arg->valid & FATTR_UID) && arg->uid != file->uid) || ((arg->valid & FATTR_GID) && arg->gid != file->gid))
		return 0;
	if ((arg->valid & FATTR_MODE) && (arg->mode & 07777) != mode_of(file, &status) &&
	    (!may_say(arg->mode & 07777) || fchmod(file->fd, arg->mode & 07777) < 0))
		return 0;
	times[0] = status.st_atim, times[1] = status.st_mtim;
	if (arg->valid & FATTR_MTIME)
		times[1] = (struct timespec){(time_t)(int64_t)arg->mtime, (long)arg->mtimensec};
	return futimens(file->fd, times) == 0;
}

/* Requests: whether they are answered. *body*: what follows the header, *length* bytes. */

static int set_attributes(int device, const struct fuse_in_header *in, const struct file *file, const void *body)
{
	struct fuse_setattr_in arg;
	int is_set;

	memcpy(&arg, body, sizeof(arg));
	if (!(arg.valid & SETS) || (arg.valid & ~(uint32_t)(SETS | FATTR_FH | FATTR_LOCKOWNER)) ||
	    !hold_writers(file->inode))
		return 0;
	is_set = set_while_written(file, &arg); /* No seal comes in between. */
	let_go_writers(file->inode);
	return is_set && reply_attributes(device, in->unique, file);
}

static int has_room(void)
{
	uint64_t written = 0;

	for (uint64_t place = written_place; place < (uint64_t)views.counters.len / 8; place += width)
		written += counters[place];
	return written < *budget;
}

static int write_all(int fd, const char *bytes, size_t length, off_t offset)
{
	ssize_t count = 0;

	while (length && (count = pwrite(fd, bytes, length, offset)) > 0)
		bytes += count, length -= (size_t)count, offset += count;
	return length == 0;
}

static int64_t now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return as_ns(now);
}

/* How often this thread gave up the processor to wait for something. */
static long waits(void)
{
	struct rusage usage = {0};

	getrusage(RUSAGE_THREAD, &usage);
	return usage.ru_nvcsw;
}

/* As `write_all`, of more than a few bytes; return 0 also where the disk was waited for just now. */
static int write_large(int fd, const char *bytes, size_t length, off_t offset)
{
	int64_t began_ns = now_ns();
	long waits_before = waits();
	int is_done;

	if (began_ns < slow_until_ns)
		return 0;
	is_done = write_all(fd, bytes, length, offset);
	if (waits() != waits_before && now_ns() - began_ns > SLOW_NS)
		slow_until_ns = now_ns() + SLOW_FOR_NS;
	return is_done;
}

static int write_bytes(int device, const struct fuse_in_header *in, const struct file *file, const char *body,
		       size_t length)
{
	int (*write)(int, const char *, size_t, off_t);
	struct fuse_write_out out = {0};
	struct fuse_write_in arg;
	int is_done;

	memcpy(&arg, body, sizeof(arg));
	if (arg.fh != (in->nodeid | WRITING_BIT) || arg.size > length - sizeof(arg) || arg.size > WRITE_BYTES_MAX ||
	    arg.offset > OBJECT_BYTES_MAX - WRITE_BYTES_MAX || !has_room())
		return 0;
	write = arg.size > SMALL_BYTES_MAX ? write_large : write_all;
	Py_BEGIN_ALLOW_THREADS
	is_done = write(file->fd, body + sizeof(arg), arg.size, (off_t)arg.offset);
	Py_END_ALLOW_THREADS
	if (!is_done)
		return 0; /* Python says what is wrong. */
	counters[own_row + written_place] += arg.size;
	out.size = arg.size;
	send_reply(device, in->unique, 0, &out, sizeof(out));
	return 1;
}

static int release(int device, const struct fuse_in_header *in, struct file *file, const void *body)
{
	struct fuse_release_in arg;
	PyObject *result;

	memcpy(&arg, body, sizeof(arg));
	if (arg.fh != (in->nodeid | WRITING_BIT) || !count_last(in->nodeid, in->unique))
		return 0;
	drop(file);
	send_reply(device, in->unique, 0, NULL, 0);
	result = PyObject_CallFunction(closed, "K", (unsigned long long)in->nodeid);
	if (!result)
		PyErr_WriteUnraisable(closed);
	Py_XDECREF(result);
	return 1;
}

static int answer(int device, const struct fuse_in_header *in, struct file *file, const char *body, size_t length)
{
	if (file->is_others && in->opcode != FUSE_WRITE)
		return 0;
	switch (in->opcode) {
	case FUSE_GETATTR:
		return reply_attributes(device, in->unique, file);
	case FUSE_SETATTR:
		return length >= sizeof(struct fuse_setattr_in) && set_attributes(device, in, file, body);
	case FUSE_WRITE:
		return length >= sizeof(struct fuse_write_in) && write_bytes(device, in, file, body, length);
	case FUSE_RELEASE:
		return length >= sizeof(struct fuse_release_in) && release(device, in, file, body);
	}
	return 0;
}

int written_answer(int device, const struct fuse_in_header *in, size_t length)
{
	struct file *file = is_set_up ? file_of(in->nodeid) : NULL;

	if (!file || !answer(device, in, file, (const char *)(in + 1), length - sizeof(*in)))
		return 0;
	counters[own_row + requests_place]++;
	return 1;
}

/* What Python calls */

/* For tests, which set it up several times. */
static void forget_all(void)
{
	if (!is_set_up)
		return;
	is_set_up = 0, slow_until_ns = 0;
	for (struct file *file = files; file < files + FILES_MAX; file++)
		drop(file);
	PyBuffer_Release(&views.generations), PyBuffer_Release(&views.counters), PyBuffer_Release(&views.budget);
	Py_CLEAR(closed);
}

static PyObject *set_up_written(PyObject *self, PyObject *args)
{
	PyObject *closing;

	(void)self;
	forget_all();
	if (!PyArg_ParseTuple(args, "w*w*(KKKK)w*KO", &views.generations, &views.counters, &width, &own_row,
			      &requests_place, &written_place, &views.budget, &attributes_valid_s, &closing))
		return NULL;
	generations = views.generations.buf, counters = views.counters.buf, budget = views.budget.buf;
	generation_cells = (uint64_t)views.generations.len / 8 - 1; /* The last is the epoch. */
	closed = Py_NewRef(closing);
	is_set_up = 1;
	Py_RETURN_NONE;
}

static PyObject *entry_reply(const struct file *file, double valid_s)
{
	struct {
		struct fuse_entry_out entry;
		struct open_out open;
	} out = {.open = {file->inode | WRITING_BIT, FOPEN_KEEP_CACHE, 0}};
	struct stat status;

	if (fstat(file->fd, &status) < 0)
		return PyErr_SetFromErrno(PyExc_OSError);
	out.entry.nodeid = file->inode;
	out.entry.entry_valid = (uint64_t)valid_s;
	out.entry.entry_valid_nsec = (uint32_t)((valid_s - (double)out.entry.entry_valid) * 1e9);
	out.entry.attr_valid = attributes_valid_s;
	out.entry.attr = shown(file, &status);
	return PyBytes_FromStringAndSize((const char *)&out, sizeof(out));
}

static PyObject *made(PyObject *self, PyObject *args)
{
	struct file file = {0};
	unsigned long long inode, request, generation, epoch;
	long long ctime_ns;
	PyObject *path;
	double valid_s;
	int answered_cached;

	(void)self;
	if (!PyArg_ParseTuple(args, "KKO&IIIL(KK)pd", &inode, &request, PyUnicode_FSConverter, &path, &file.mode,
			      &file.uid, &file.gid, &ctime_ns, &generation, &epoch, &answered_cached, &valid_s))
		return NULL;
	file.inode = inode, file.ctime_ns = ctime_ns, file.generation = generation, file.epoch = epoch;
	file.fd = is_set_up ? open(PyBytes_AS_STRING(path), O_RDWR | O_CLOEXEC) : -1;
	Py_DECREF(path);
	if (file.fd < 0)
		Py_RETURN_NONE;
	if (!count_first(inode, request, answered_cached)) {
		close(file.fd);
		Py_RETURN_NONE;
	}
	drop(&files[inode % FILES_MAX]);
	files[inode % FILES_MAX] = file;
	return entry_reply(&file, valid_s);
}

static PyObject *written_to(PyObject *self, PyObject *args)
{
	struct file file = {.is_others = 1};
	unsigned long long inode, generation, epoch;
	PyObject *path;

	(void)self;
	if (!PyArg_ParseTuple(args, "KO&(KK)", &inode, PyUnicode_FSConverter, &path, &generation, &epoch))
		return NULL;
	file.inode = inode, file.generation = generation, file.epoch = epoch;
	file.fd = is_set_up && !file_of(inode) ? open(PyBytes_AS_STRING(path), O_RDWR | O_CLOEXEC) : -1;
	Py_DECREF(path);
	if (file.fd < 0)
		Py_RETURN_NONE;
	drop(&files[inode % FILES_MAX]);
	files[inode % FILES_MAX] = file;
	Py_RETURN_NONE;
}

/* What another worker closed, or the mover has changed, is kept open by nobody else. */
static PyObject *drop_closed(PyObject *self, PyObject *unused)
{
	(void)self, (void)unused;
	for (struct file *file = files; file < files + FILES_MAX; file++)
		if (file->inode && (!is_true_still(file) || !has_writers(file->inode)))
			drop(file);
	Py_RETURN_NONE;
}

static PyObject *answer_written(PyObject *self, PyObject *args)
{
	struct fuse_in_header in;
	Py_buffer request;
	int device, is_answered;

	(void)self;
	if (!PyArg_ParseTuple(args, "iy*", &device, &request))
		return NULL;
	is_answered = (size_t)request.len >= sizeof(in) && written_answer(device, request.buf, (size_t)request.len);
	PyBuffer_Release(&request);
	return PyBool_FromLong(is_answered);
}

static PyMethodDef methods[] = {
	{"set_up_written", set_up_written, METH_VARARGS,
	 "set_up_written(generations, counters, places, budget, valid_s, closed).\n\n"
	 "*closed* is called with the inode whose last open was counted off here."},
	{"made", made, METH_VARARGS,
	 "made(inode, request, path, mode, uid, gid, ctime_ns, generation, answered_cached, valid_s) -> bytes | None:\n\n"
	 "Count the first open of a file that was just made, and answer for it from now on. Return what its CREATE\n"
	 "is answered with; None, with nothing counted, where that is for Python."},
	{"written_to", written_to, METH_VARARGS,
	 "written_to(inode, path, generation): answer WRITEs of a file that somebody has open for writing from now on."},
	{"answer_written", answer_written, METH_VARARGS,
	 "answer_written(device, request) -> bool: answer it as if it had come from the kernel. For tests."},
	{"drop_closed", drop_closed, METH_NOARGS, "Close the descriptors of files that are not written to any more."},
	{0},
};

int written_add(PyObject *module)
{
	return PyModule_AddFunctions(module, methods);
}
