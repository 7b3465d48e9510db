/* What SluiceFS needs of libfuse and pyfuse3 does not expose.
 *
 * This library is loaded with RTLD_GLOBAL before pyfuse3, so that pyfuse3's calls of the four
 * libfuse functions below bind to it. Each calls libfuse's own and changes one thing:
 *
 * fuse_session_receive_buf
 *   Where a thread receives (receiver.c: several workers), it hands over what that has kept. Else it
 *   calls libfuse's own. The supervisor has set O_NONBLOCK on the device then: should another process be
 *   faster, read(2) fails with EAGAIN. libfuse passes that on as -EAGAIN, which pyfuse3 takes for
 *   a failure of the session, while -EINTR is "wait again".
 *
 *   Where open(2) sends no request (the first OPEN was answered with ENOSYS), the kernel's file
 *   handle is 0 in every READ, and pyfuse3 hands its handlers only the handle. An inode number
 *   takes its place; SluiceFS never gives out the handle 0 itself.
 *
 *   The kernel asks for the attribute security.capability before each write, unless a file system
 *   takes over what it does then. SluiceFS keeps none of these, and says so here: through Python the
 *   question would cost as much as a small write.
 *
 *   The number and the process of the request that was received last are kept for the handler that
 *   pyfuse3 starts with it: last_unique(), last_pid().
 *
 *   Opens and releases of inodes that have a grant are answered here (grants.c). While requests of this
 *   kind come one upon the other, the next is waited for here.
 *
 * fuse_session_new
 *   INIT's reply carries how many requests that nobody waits for, reads ahead among them, may be
 *   under way. libfuse leaves the kernel's 12, which is fewer than the readers of one training
 *   job. Splicing is turned off: small requests are copied faster than they go through a pipe. And the
 *   kernel is to keep its pages of a file whose mtime has changed: nobody but itself writes to an inode.
 *
 * fuse_reply_open
 *   pyfuse3's opendir can't ask the kernel to keep a directory's entries. Two high bits of the
 *   handle say it here: the kernel may cache them, and what it has cached already is still good.
 *
 * fuse_session_mount
 *   libfuse's public hook for its device I/O is set. Each reply then comes by here in the kernel's format.
 *   INIT's gets what has the kernel look several names of one directory up at once, which libfuse 3.14
 *   does not say. Where want_passthrough() was called, it gets what agrees on FUSE_PASSTHROUGH, if the
 *   kernel offers it. To an OPEN or CREATE that pass_through() named, the backing id is added: the
 *   kernel then reads and writes the file behind that id, and no READ or WRITE is sent.
 *
 * All state is set once, before the fork, or is the process's own. Wire format: linux/fuse.h, a stable
 * ABI.
 */
#define _GNU_SOURCE
#include "channel.h"

#include <dlfcn.h>
#include <errno.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define MAX_BACKGROUND 256
#define CONGESTION_THRESHOLD 192
#define FLAGS2_PASSTHROUGH (UINT32_C(1) << 5) /* FUSE_PASSTHROUGH, kernel 6.9: bit 37 of the flags. */
#define INIT_EXT (UINT32_C(1) << 30)	      /* FUSE_INIT_EXT. */
#define OPEN_PASSTHROUGH (UINT32_C(1) << 7)   /* FOPEN_PASSTHROUGH. */
#define STACK_DEPTH 1			      /* The backing file is on no stacked file system. */
#define REPLIES_MAX 256
#define CACHE_ENTRIES (UINT64_C(1) << 60) /* Of a directory handle, as in operations.py. */
#define KEEP_ENTRIES (UINT64_C(1) << 61)
#define ANSWERS_MAX 64	  /* In one go: then Python's other tasks have their turn. */
#define HEADERS_BYTES 4096 /* Before the bytes of a WRITE; as libfuse has it. */
#define TURN_NS 10000000L /* So long at most: a write may wait for the disk. */
#define LINGER_NS 100000L /* A program takes less between two opens of small files. */

typedef int receive_function(struct fuse_session *, struct fuse_buf *);

typedef int reply_open_function(fuse_req_t, const struct fuse_file_info *);

static receive_function *receive_of_libfuse;
static reply_open_function *reply_open_of_libfuse;

static uint64_t last_unique;
static uint32_t last_pid;

static enum { UNWANTED, NO_HOOK, NO_KERNEL, AGREED } passthrough = UNWANTED;
static uint64_t init_unique; /* Of INIT, until it is answered. */
static int offers_passthrough, offers_parallel;
static struct fuse_session *hooked; /* The session whose replies come by here; NULL: none. */
static uint32_t max_write;	     /* As the kernel was told. */

/* The first fields of the kernel's fuse_init_in and fuse_init_out. Older headers lack the last. */
struct init_in {
	uint32_t major, minor, max_readahead, flags, flags2;
};

struct init_out {
	uint32_t major, minor, max_readahead, flags;
	uint16_t max_background, congestion_threshold;
	uint32_t max_write, time_gran;
	uint16_t max_pages, map_alignment;
	uint32_t flags2, max_stack_depth;
};

/* Opens that are answered next with a backing id. They are few: pyfuse3 answers when the handler
 * returns, so there is one unless a handler waits in between. */
static struct {
	uint64_t unique;
	int32_t backing_id;
} replies[REPLIES_MAX];
static unsigned reply_count;

static int32_t take_backing_id(uint64_t unique)
{
	for (unsigned i = 0; i < reply_count; i++)
		if (replies[i].unique == unique) {
			int32_t backing_id = replies[i].backing_id;

			replies[i] = replies[--reply_count];
			return backing_id;
		}
	return 0;
}

/* Buffers need not be aligned for what is in them: it is copied in and out. */

static void note_init(const struct fuse_in_header *in, size_t length)
{
	struct init_in arg;

	init_unique = in->unique;
	offers_passthrough = offers_parallel = 0;
	if (length < sizeof(*in) + sizeof(arg))
		return;
	memcpy(&arg, in + 1, sizeof(arg));
	offers_parallel = (arg.flags & FUSE_PARALLEL_DIROPS) != 0;
	if (passthrough == NO_KERNEL)
		offers_passthrough = (arg.flags & INIT_EXT) && (arg.flags2 & FLAGS2_PASSTHROUGH);
}

static void change_init(const struct iovec *body)
{
	struct init_out arg;

	if (body->iov_len < sizeof(arg))
		return;
	memcpy(&arg, body->iov_base, sizeof(arg));
	max_write = arg.max_write;
	if (offers_parallel)
		arg.flags |= FUSE_PARALLEL_DIROPS;
	/* The kernel takes one of the two. */
	if (offers_passthrough && !(arg.flags & FUSE_WRITEBACK_CACHE)) {
		arg.flags |= INIT_EXT;
		arg.flags2 |= FLAGS2_PASSTHROUGH;
		arg.max_stack_depth = STACK_DEPTH;
		passthrough = AGREED;
	}
	memcpy(body->iov_base, &arg, sizeof(arg));
}

static void add_backing_id(const struct iovec *body, int32_t backing_id)
{
	struct open_out arg; /* The last of a CREATE's reply, and all of an OPEN's. */
	char *place = (char *)body->iov_base + body->iov_len - sizeof(arg);

	if (body->iov_len < sizeof(arg))
		return;
	memcpy(&arg, place, sizeof(arg));
	/* The kernel refuses these two beside it: the backing file has a page cache of its own. */
	arg.open_flags &= ~(uint32_t)(FOPEN_KEEP_CACHE | FOPEN_DIRECT_IO);
	arg.open_flags |= OPEN_PASSTHROUGH;
	arg.backing_id = backing_id;
	memcpy(place, &arg, sizeof(arg));
}

static void change_reply(const struct iovec *pieces, int count)
{
	struct fuse_out_header out;
	int32_t backing_id;

	if ((!init_unique && !reply_count) || count < 1 || pieces[0].iov_len < sizeof(out))
		return;
	memcpy(&out, pieces[0].iov_base, sizeof(out));
	if (!out.unique) /* A notification. */
		return;
	if (out.unique == init_unique) {
		init_unique = 0;
		if (!out.error && count == 2)
			change_init(&pieces[1]);
		return;
	}
	backing_id = take_backing_id(out.unique & ~UNIQUE_RESEND);
	if (backing_id && !out.error && count == 2)
		add_backing_id(&pieces[1], backing_id);
}

static void note_request(struct fuse_in_header *in, size_t length)
{
	struct fuse_read_in *arg = (struct fuse_read_in *)(in + 1);

	if (length < sizeof(*in))
		return;
	last_unique = in->unique & ~UNIQUE_RESEND;
	last_pid = in->pid;
	if (in->opcode == FUSE_INIT)
		note_init(in, length);
	if (in->opcode == FUSE_READ && length >= sizeof(*in) + sizeof(*arg) && arg->fh == 0)
		arg->fh = in->nodeid;
}

static int asks_for_capabilities(const struct fuse_in_header *in, size_t length)
{
	static const char name[] = "security.capability";
	size_t start = sizeof(*in) + sizeof(struct fuse_getxattr_in);

	return length >= start + sizeof(name) && in->opcode == FUSE_GETXATTR &&
	       !memcmp((const char *)in + start, name, sizeof(name));
}

static int answer_no_data(int device, const struct fuse_in_header *in)
{
	struct fuse_out_header out = {sizeof(out), -ENODATA, in->unique};

	/* It fails where nobody waits for the answer any more. */
	if (write(device, &out, sizeof(out)) < 0)
		return 1;
	return 1;
}

int answer_here(int device, const void *request, size_t length)
{
	const struct fuse_in_header *in = request;

	if (asks_for_capabilities(in, length))
		return answer_no_data(device, in);
	return answer_granted(device, request, length);
}

/* One request, from whoever receives here. */
static int receive(struct fuse_session *session, struct fuse_buf *buffer)
{
	int result = is_receiving() ? receive_from_thread(session, buffer) : receive_of_libfuse(session, buffer);

	return result == -EAGAIN ? -EINTR : result;
}

/* Return whether the request needs pyfuse3 no more. A thread that receives has answered what needs no Python. */
static int is_answered(struct fuse_session *session, const struct fuse_buf *buffer, size_t length)
{
	if (buffer->flags & FUSE_BUF_IS_FD)
		return 0;
	if (!is_receiving() && answer_here(fuse_session_fd(session), buffer->mem, length))
		return 1;
	return direct_answer(device_of(fuse_session_fd(session)), buffer->mem, length);
}

static int64_t ns_since(const struct timespec *began)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (int64_t)(now.tv_sec - began->tv_sec) * 1000000000 + now.tv_nsec - began->tv_nsec;
}

/* Waking Python for the next request would take longer than to answer it: it is waited for a moment. */
int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buffer)
{
	int result = receive(session, buffer);
	struct timespec began;

	clock_gettime(CLOCK_MONOTONIC, &began);
	for (int answers = 1; result > 0 && is_answered(session, buffer, (size_t)result); answers++) {
		if (answers == ANSWERS_MAX || ns_since(&began) > TURN_NS ||
		    !direct_wait(fuse_session_fd(session), LINGER_NS))
			return -EINTR;
		result = receive(session, buffer);
	}
	if (result > 0 && !(buffer->flags & FUSE_BUF_IS_FD))
		note_request(buffer->mem, (size_t)result);
	return result;
}

int fuse_reply_open(fuse_req_t request, const struct fuse_file_info *info)
{
	struct fuse_file_info changed;

	if (!(info->fh & CACHE_ENTRIES))
		return reply_open_of_libfuse(request, info);
	changed = *info;
	changed.cache_readdir = 1;
	changed.keep_cache = (info->fh & KEEP_ENTRIES) != 0;
	changed.fh &= ~(CACHE_ENTRIES | KEEP_ENTRIES);
	return reply_open_of_libfuse(request, &changed);
}

/* libfuse has the hook from 3.14 on, and another signature of it from 3.17 on. */
#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 14) && FUSE_VERSION < FUSE_MAKE_VERSION(3, 17)

typedef int custom_io_function(struct fuse_session *, const struct fuse_custom_io *, int);

static custom_io_function *custom_io_of_libfuse;

static ssize_t read_request(int fd, void *buffer, size_t length, void *unused)
{
	(void)unused;
	return read(fd, buffer, length);
}

static ssize_t write_reply(int fd, struct iovec *pieces, int count, void *unused)
{
	(void)unused;
	change_reply(pieces, count);
	return writev(device_of(fd), pieces, count);
}

static void find_hook(void *libfuse)
{
	custom_io_of_libfuse = (custom_io_function *)dlsym(libfuse, "fuse_session_custom_io");
}

static int set_hook(struct fuse_session *session)
{
	static const struct fuse_custom_io io = {.read = read_request, .writev = write_reply};

	if (!custom_io_of_libfuse)
		return -1;
	return custom_io_of_libfuse(session, &io, fuse_session_fd(session));
}
#else
static void find_hook(void *libfuse)
{
	(void)libfuse;
}

static int set_hook(struct fuse_session *session)
{
	(void)session, (void)change_reply;
	return -1;
}
#endif

typedef int mount_function(struct fuse_session *, const char *);

static mount_function *mount_of_libfuse;

int fuse_session_mount(struct fuse_session *session, const char *mountpoint)
{
	int result = mount_of_libfuse(session, mountpoint);

	if (result || set_hook(session))
		return result;
	hooked = session;
	if (passthrough == NO_HOOK)
		passthrough = NO_KERNEL; /* Until INIT says better. */
	return 0;
}

/* From libfuse 3.17 on the function is versioned and pyfuse3 may call another one: the kernel's
 * defaults stay there. */
#if FUSE_VERSION < FUSE_MAKE_VERSION(3, 17)
#define SETS_BACKGROUND 1

typedef struct fuse_session *new_function(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
					  void *);
typedef void init_function(void *, struct fuse_conn_info *);

static new_function *new_of_libfuse;
static init_function *init_of_pyfuse3;

static void init_with_limits(void *userdata, struct fuse_conn_info *connection)
{
	connection->max_background = MAX_BACKGROUND;
	connection->congestion_threshold = CONGESTION_THRESHOLD;
	connection->want &= ~(FUSE_CAP_SPLICE_READ | FUSE_CAP_SPLICE_WRITE | FUSE_CAP_SPLICE_MOVE);
	if (connection->capable & FUSE_CAP_EXPLICIT_INVAL_DATA) {
		connection->want &= ~FUSE_CAP_AUTO_INVAL_DATA;
		connection->want |= FUSE_CAP_EXPLICIT_INVAL_DATA;
	}
	if (init_of_pyfuse3)
		init_of_pyfuse3(userdata, connection);
}

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *operations,
				      size_t size, void *userdata)
{
	struct fuse_lowlevel_ops changed;

	memset(&changed, 0, sizeof(changed));
	memcpy(&changed, operations, size < sizeof(changed) ? size : sizeof(changed));
	init_of_pyfuse3 = changed.init;
	changed.init = init_with_limits;
	return new_of_libfuse(args, &changed, sizeof(changed), userdata);
}
#else
#define SETS_BACKGROUND 0
#endif

static PyObject *get_last_unique(PyObject *self, PyObject *unused)
{
	(void)self, (void)unused;
	return PyLong_FromUnsignedLongLong(last_unique);
}

static PyObject *get_last_pid(PyObject *self, PyObject *unused)
{
	(void)self, (void)unused;
	return PyLong_FromUnsignedLong(last_pid);
}

static PyObject *want_passthrough(PyObject *self, PyObject *unused)
{
	(void)self, (void)unused;
	if (passthrough == UNWANTED)
		passthrough = NO_HOOK;
	Py_RETURN_NONE;
}

static PyObject *passthrough_failure(PyObject *self, PyObject *unused)
{
	static const char *const reasons[] = {"not asked for", "libfuse 3.14 to 3.16 is needed",
					      "the kernel does not offer it: 6.9 or later is needed"};

	(void)self, (void)unused;
	if (passthrough == AGREED)
		Py_RETURN_NONE;
	return PyUnicode_FromString(reasons[passthrough]);
}

static PyObject *pass_through(PyObject *self, PyObject *args)
{
	unsigned long long unique;
	int backing_id;

	(void)self;
	if (!PyArg_ParseTuple(args, "Ki", &unique, &backing_id))
		return NULL;
	if (passthrough != AGREED || !unique || (unique & UNIQUE_RESEND) || backing_id <= 0) {
		PyErr_SetString(PyExc_ValueError, "no passthrough, no such request, or no backing id");
		return NULL;
	}
	take_backing_id(unique); /* Of an earlier try to answer it. */
	if (reply_count == REPLIES_MAX) {
		PyErr_SetString(PyExc_OverflowError, "too many opens with a backing id are unanswered");
		return NULL;
	}
	replies[reply_count].unique = unique;
	replies[reply_count++].backing_id = backing_id;
	Py_RETURN_NONE;
}

static PyObject *can_receive_in_thread(PyObject *self, PyObject *unused)
{
	(void)self, (void)unused;
	return PyBool_FromLong(hooked && max_write);
}

static PyObject *receive_in_thread(PyObject *self, PyObject *unused)
{
	int device;

	(void)self, (void)unused;
	if (!hooked || !max_write || is_receiving()) {
		PyErr_SetString(PyExc_ValueError, "no session that a thread could receive for, or one does");
		return NULL;
	}
	device = start_receiving(fuse_session_fd(hooked), max_write + HEADERS_BYTES);
	return device < 0 ? NULL : PyLong_FromLong(device);
}

static PyMethodDef methods[] = {
	{"can_receive_in_thread", can_receive_in_thread, METH_NOARGS,
	 "Return whether the session's I/O comes by here: not before INIT, nor where libfuse lacks the hook."},
	{"receive_in_thread", receive_in_thread, METH_NOARGS,
	 "Have a thread receive requests from now on; return the device's descriptor. After the fork, once.\n\n"
	 "The session's is readable then while a request waits for Python. The device is to block."},
	{"want_passthrough", want_passthrough, METH_NOARGS,
	 "Have the next session ask the kernel for FUSE_PASSTHROUGH. Call it before pyfuse3.init."},
	{"passthrough_failure", passthrough_failure, METH_NOARGS,
	 "Return None where the kernel agreed to FUSE_PASSTHROUGH, else why it did not."},
	{"pass_through", pass_through, METH_VARARGS,
	 "pass_through(unique, backing_id): answer this OPEN or CREATE with this backing id.\n\n"
	 "Call it just before the handler returns. An error as the answer takes it back."},
	{"last_unique", get_last_unique, METH_NOARGS,
	 "Return the number of the request received last, the same when the kernel sends it again.\n\n"
	 "A handler reads it before its first await: then the next request may be there."},
	{"last_pid", get_last_pid, METH_NOARGS, "Return the process that the last request came from, or 0."},
	{0},
};

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_channel",
	.m_doc = "Changes four calls of pyfuse3 into libfuse; see channel.c. Import with RTLD_GLOBAL, first.",
	.m_size = -1,
	.m_methods = methods,
};

static int find_functions(void)
{
	void *libfuse = dlopen("libfuse3.so.3", RTLD_NOW | RTLD_LOCAL);

	if (!libfuse) {
		PyErr_SetString(PyExc_ImportError, dlerror());
		return -1;
	}
	receive_of_libfuse = (receive_function *)dlsym(libfuse, "fuse_session_receive_buf");
	reply_open_of_libfuse = (reply_open_function *)dlsym(libfuse, "fuse_reply_open");
	mount_of_libfuse = (mount_function *)dlsym(libfuse, "fuse_session_mount");
	find_hook(libfuse);
	if (!reply_open_of_libfuse || reply_open_of_libfuse == fuse_reply_open || !mount_of_libfuse ||
	    mount_of_libfuse == fuse_session_mount)
		receive_of_libfuse = NULL;
#if SETS_BACKGROUND
	new_of_libfuse = (new_function *)dlsym(libfuse, "fuse_session_new");
	if (!new_of_libfuse || new_of_libfuse == fuse_session_new)
		receive_of_libfuse = NULL;
#endif
	if (!receive_of_libfuse || receive_of_libfuse == fuse_session_receive_buf) {
		PyErr_SetString(PyExc_ImportError, "libfuse3 lacks a function that is needed");
		return -1;
	}
	return 0;
}

PyMODINIT_FUNC PyInit__channel(void)
{
	PyObject *made;

	if (find_functions() < 0)
		return NULL;
	made = PyModule_Create(&module);
	if (made && (PyModule_AddFunctions(made, grants_methods) < 0 ||
		     PyModule_AddFunctions(made, reads_methods) < 0 ||
		     PyModule_AddFunctions(made, counted_methods) < 0 || direct_add(made) < 0 || written_add(made) < 0 ||
		     PyModule_AddIntConstant(made, "sets_background", SETS_BACKGROUND) < 0))
		Py_CLEAR(made);
	return made;
}
