/* What SluiceFS needs of libfuse and pyfuse3 does not expose.
 *
 * This library is loaded with RTLD_GLOBAL before pyfuse3, so that pyfuse3's calls of the four
 * libfuse functions below bind to it. Each calls libfuse's own and changes one thing:
 *
 * fuse_session_receive_buf
 *   Several workers wait for the same device. The kernel wakes all of them for one request; one
 *   gets it, and the others would block in read(2) with their answers unsent. So the supervisor
 *   sets O_NONBLOCK on the device, and the loser's read fails with EAGAIN. libfuse passes that on
 *   as -EAGAIN, which pyfuse3 takes for a failure of the session, while -EINTR is "wait again".
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
 *   An open for reading of an inode that has a grant is answered here, and so is its release: through
 *   Python the two cost ten times as much. Who gets a grant, Python decides, once for many opens (grants.py).
 *   The table of grants lies in memory that all processes share, a 64-bit word for each inode, so that each
 *   step is one compare-and-swap. Which inodes were opened is kept for Python, which asks every so often:
 *   drained(). While requests of this kind come one upon the other, the next is waited for here.
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
 *   Where want_passthrough() was called, libfuse's public hook for its device I/O is set. Each reply
 *   then comes by here in the kernel's format. INIT's gets what agrees on FUSE_PASSTHROUGH, if the
 *   kernel offers it. To an OPEN or CREATE that pass_through() named, the backing id is added: the
 *   kernel then reads and writes the file behind that id, and no READ or WRITE is sent.
 *
 * All state is set once, before the fork, or is the process's own. Wire format: linux/fuse.h, a stable
 * ABI.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define FUSE_USE_VERSION 31
#include <Python.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fuse3/fuse_lowlevel.h>
#include <linux/fuse.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "direct.h"

#define MAX_BACKGROUND 256
#define CONGESTION_THRESHOLD 192
#define UNIQUE_RESEND (UINT64_C(1) << 63) /* FUSE_UNIQUE_RESEND of newer headers. */
#define FLAGS2_PASSTHROUGH (UINT32_C(1) << 5) /* FUSE_PASSTHROUGH, kernel 6.9: bit 37 of the flags. */
#define INIT_EXT (UINT32_C(1) << 30)	      /* FUSE_INIT_EXT. */
#define OPEN_PASSTHROUGH (UINT32_C(1) << 7)   /* FOPEN_PASSTHROUGH. */
#define OPEN_NOFLUSH (UINT32_C(1) << 5)	      /* FOPEN_NOFLUSH, kernel 5.16. */
#define STACK_DEPTH 1			      /* The backing file is on no stacked file system. */
#define REPLIES_MAX 256
#define CACHE_ENTRIES (UINT64_C(1) << 60) /* Of a directory handle, as in operations.py. */
#define KEEP_ENTRIES (UINT64_C(1) << 61)
#define GRANTED_BIT (UINT64_C(1) << 63) /* Of a file handle that was given out here, as in filesystem.py. */
/* A word of the table: the inode above, then whether the grant was withdrawn, then how many have it open. */
#define WITHDRAWN (UINT64_C(1) << 23)
#define COUNT_MAX (WITHDRAWN - 1)
#define INODE_SHIFT 24
#define GRANTED_INODE_MAX ((UINT64_C(1) << (64 - INODE_SHIFT)) - 1)
#define OPENED_MAX 8192
#define ANSWERS_MAX 64	  /* In one go: then Python's other tasks have their turn. */
#define TURN_NS 10000000L /* So long at most: a write may wait for the disk. */
#define LINGER_NS 100000L /* A program takes less between two opens of small files. */

typedef int receive_function(struct fuse_session *, struct fuse_buf *);

typedef int reply_open_function(fuse_req_t, const struct fuse_file_info *);

static receive_function *receive_of_libfuse;
static reply_open_function *reply_open_of_libfuse;

static uint64_t last_unique;
static uint32_t last_pid;

static enum { UNWANTED, NO_HOOK, NO_KERNEL, AGREED } passthrough = UNWANTED;
static uint64_t init_unique; /* Of the INIT that offered FUSE_PASSTHROUGH, until it is answered. */

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

struct open_out {
	uint64_t fh;
	uint32_t open_flags;
	int32_t backing_id;
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

	if (passthrough != NO_KERNEL || length < sizeof(*in) + sizeof(arg))
		return;
	memcpy(&arg, in + 1, sizeof(arg));
	if ((arg.flags & INIT_EXT) && (arg.flags2 & FLAGS2_PASSTHROUGH))
		init_unique = in->unique;
}

static void agree_on_passthrough(const struct iovec *body)
{
	struct init_out arg;

	if (body->iov_len < sizeof(arg))
		return;
	memcpy(&arg, body->iov_base, sizeof(arg));
	if (arg.flags & FUSE_WRITEBACK_CACHE) /* The kernel takes one of the two. */
		return;
	arg.flags |= INIT_EXT;
	arg.flags2 |= FLAGS2_PASSTHROUGH;
	arg.max_stack_depth = STACK_DEPTH;
	memcpy(body->iov_base, &arg, sizeof(arg));
	passthrough = AGREED;
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
			agree_on_passthrough(&pieces[1]);
		return;
	}
	backing_id = take_backing_id(out.unique & ~UNIQUE_RESEND);
	if (backing_id && !out.error && count == 2)
		add_backing_id(&pieces[1], backing_id);
}

/* Grants. The table is any process's, what follows it is this one's. */

struct grants {
	uint64_t *words;
	uint64_t count; /* A power of two. */
};

static struct grants answered_from; /* None: {0}. */
static Py_buffer answered_view;
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
static int give_grant(struct grants grants, uint64_t inode)
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

static void answer(struct fuse_session *session, uint64_t unique, const void *body, size_t length, int *failed)
{
	struct fuse_out_header out = {(uint32_t)(sizeof(out) + length), 0, unique};
	struct iovec pieces[] = {{&out, sizeof(out)}, {(void *)body, length}};

	/* It fails where nobody waits for the answer any more. */
	*failed = writev(fuse_session_fd(session), pieces, length ? 2 : 1) < 0;
	answered_count++;
}

static int answer_open(struct fuse_session *session, const struct fuse_in_header *in)
{
	struct fuse_open_in arg;
	struct open_out out = {in->nodeid | GRANTED_BIT, FOPEN_KEEP_CACHE | OPEN_NOFLUSH, 0};
	int failed;

	memcpy(&arg, in + 1, sizeof(arg));
	if ((arg.flags & (O_ACCMODE | O_TRUNC | O_DIRECT)) != O_RDONLY || opened_count == OPENED_MAX)
		return 0;
	if (!open_granted(answered_from, in->nodeid))
		return 0;
	answer(session, in->unique, &out, sizeof(out), &failed);
	if (failed)
		close_granted(answered_from, in->nodeid, 1);
	opened[opened_count].inode = in->nodeid;
	clock_gettime(CLOCK_REALTIME, &opened[opened_count++].at);
	return 1;
}

/* One that is sent again may have been counted by a process that died since. A count that is one too
 * many keeps a file longer than needed, one that is too few would take it from its readers. */
static int answer_release(struct fuse_session *session, const struct fuse_in_header *in)
{
	struct fuse_release_in arg;
	int failed;

	memcpy(&arg, in + 1, sizeof(arg));
	if (!(arg.fh & GRANTED_BIT))
		return 0;
	if (!(in->unique & UNIQUE_RESEND) && !close_granted(answered_from, in->nodeid, 0))
		return 0;
	answer(session, in->unique, NULL, 0, &failed);
	return 1;
}

static int answer_granted(struct fuse_session *session, const struct fuse_buf *buffer, size_t length)
{
	const struct fuse_in_header *in = buffer->mem;

	if (!answered_from.words || (buffer->flags & FUSE_BUF_IS_FD) || length < sizeof(*in))
		return 0;
	if (in->opcode == FUSE_OPEN && length >= sizeof(*in) + sizeof(struct fuse_open_in))
		return !(in->unique & UNIQUE_RESEND) && answer_open(session, in);
	if (in->opcode == FUSE_RELEASE && length >= sizeof(*in) + sizeof(struct fuse_release_in))
		return answer_release(session, in);
	return 0;
}

static void note_request(struct fuse_buf *buffer, size_t length)
{
	struct fuse_in_header *in = buffer->mem;
	struct fuse_read_in *arg = (struct fuse_read_in *)(in + 1);

	if ((buffer->flags & FUSE_BUF_IS_FD) || length < sizeof(*in))
		return;
	last_unique = in->unique & ~UNIQUE_RESEND;
	last_pid = in->pid;
	if (in->opcode == FUSE_INIT)
		note_init(in, length);
	if (in->opcode == FUSE_READ && length >= sizeof(*in) + sizeof(*arg) && arg->fh == 0)
		arg->fh = in->nodeid;
}

static int asks_for_capabilities(const struct fuse_buf *buffer, size_t length)
{
	static const char name[] = "security.capability";
	const struct fuse_in_header *in = buffer->mem;
	size_t start = sizeof(*in) + sizeof(struct fuse_getxattr_in);

	return !(buffer->flags & FUSE_BUF_IS_FD) && length >= start + sizeof(name) &&
	       in->opcode == FUSE_GETXATTR && !memcmp((const char *)buffer->mem + start, name, sizeof(name));
}

static void answer_no_data(struct fuse_session *session, const struct fuse_buf *buffer)
{
	const struct fuse_in_header *in = buffer->mem;
	struct fuse_out_header out = {sizeof(out), -ENODATA, in->unique};

	/* It fails where nobody waits for the answer any more. */
	if (write(fuse_session_fd(session), &out, sizeof(out)) < 0)
		return;
}

static int answer_here(struct fuse_session *session, const struct fuse_buf *buffer, size_t length)
{
	if (asks_for_capabilities(buffer, length)) {
		answer_no_data(session, buffer);
		return 1;
	}
	return answer_granted(session, buffer, length) || direct_answer(session, buffer, length);
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
	int result = receive_of_libfuse(session, buffer);
	struct timespec began;

	clock_gettime(CLOCK_MONOTONIC, &began);
	for (int answers = 1; result > 0 && answer_here(session, buffer, (size_t)result); answers++) {
		if (answers == ANSWERS_MAX || ns_since(&began) > TURN_NS || !direct_wait(session, LINGER_NS))
			return -EINTR;
		result = receive_of_libfuse(session, buffer);
	}
	if (result > 0)
		note_request(buffer, (size_t)result);
	return result == -EAGAIN ? -EINTR : result;
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
	return writev(fd, pieces, count);
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

	if (!result && passthrough == NO_HOOK && !set_hook(session))
		passthrough = NO_KERNEL; /* Until INIT says better. */
	return result;
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

/* Take (table, inode); return 0, or -1 with an exception set. The caller releases the view. */
static int parse_grant(PyObject *args, Py_buffer *view, struct grants *grants, uint64_t *inode)
{
	unsigned long long number;

	if (!PyArg_ParseTuple(args, "w*K", view, &number))
		return -1;
	*inode = number;
	grants->words = view->buf;
	grants->count = (uint64_t)view->len / sizeof(uint64_t);
	if (grants->count && !(grants->count & (grants->count - 1)) && !((uintptr_t)view->buf & 7))
		return 0;
	PyBuffer_Release(view);
	PyErr_SetString(PyExc_ValueError, "a table of grants has a power of two of 64-bit words");
	return -1;
}

static PyObject *give(PyObject *self, PyObject *args)
{
	Py_buffer view;
	struct grants grants;
	uint64_t inode;
	int is_given;

	(void)self;
	if (parse_grant(args, &view, &grants, &inode) < 0)
		return NULL;
	is_given = give_grant(grants, inode);
	PyBuffer_Release(&view);
	return PyBool_FromLong(is_given);
}

static PyObject *withdraw(PyObject *self, PyObject *args)
{
	Py_buffer view;
	struct grants grants;
	uint64_t inode, count;

	(void)self;
	if (parse_grant(args, &view, &grants, &inode) < 0)
		return NULL;
	count = withdraw_grant(grants, inode);
	PyBuffer_Release(&view);
	return PyLong_FromUnsignedLongLong(count);
}

static PyObject *count_open(PyObject *self, PyObject *args)
{
	Py_buffer view;
	struct grants grants;
	uint64_t inode, count;

	(void)self;
	if (parse_grant(args, &view, &grants, &inode) < 0)
		return NULL;
	count = granted_count(grants, inode);
	PyBuffer_Release(&view);
	return PyLong_FromUnsignedLongLong(count);
}

static PyObject *count_closed(PyObject *self, PyObject *args)
{
	Py_buffer view;
	struct grants grants;
	uint64_t inode;
	int was_open;

	(void)self;
	if (parse_grant(args, &view, &grants, &inode) < 0)
		return NULL;
	was_open = close_granted(grants, inode, 1);
	PyBuffer_Release(&view);
	return PyBool_FromLong(was_open);
}

static PyObject *answer_from(PyObject *self, PyObject *args)
{
	Py_buffer view;
	struct grants grants;
	uint64_t unused;
	PyObject *with_inode = PyTuple_Size(args) == 1 ? Py_BuildValue("(Oi)", PyTuple_GET_ITEM(args, 0), 0) : NULL;
	int result;

	(void)self;
	if (!with_inode) {
		PyErr_SetString(PyExc_TypeError, "answer_from(table)");
		return NULL;
	}
	result = parse_grant(with_inode, &view, &grants, &unused);
	Py_DECREF(with_inode);
	if (result < 0)
		return NULL;
	if (answered_from.words)
		PyBuffer_Release(&answered_view);
	answered_view = view;
	answered_from = grants;
	Py_RETURN_NONE;
}

static PyObject *drained(PyObject *self, PyObject *unused)
{
	PyObject *list = PyList_New(opened_count), *pair, *result;

	(void)self, (void)unused;
	for (unsigned i = 0; list && i < opened_count; i++) {
		double at_s = (double)opened[i].at.tv_sec + 1e-9 * (double)opened[i].at.tv_nsec;

		pair = Py_BuildValue("(Kd)", (unsigned long long)opened[i].inode, at_s);
		if (!pair)
			Py_CLEAR(list);
		else
			PyList_SET_ITEM(list, i, pair);
	}
	if (!list)
		return NULL;
	result = Py_BuildValue("(KN)", (unsigned long long)answered_count, list);
	if (result)
		opened_count = 0, answered_count = 0;
	return result;
}

static PyMethodDef methods[] = {
	{"give", give, METH_VARARGS,
	 "give(table, inode) -> bool: opens of it for reading may be answered by the channel from now on.\n\n"
	 "False where its place in the table is taken by another that is open."},
	{"withdraw", withdraw, METH_VARARGS,
	 "withdraw(table, inode): no more of them; return how many have it open, whose releases Python gets."},
	{"count_open", count_open, METH_VARARGS,
	 "count_open(table, inode): return how many opens that the channel answered are not released."},
	{"count_closed", count_closed, METH_VARARGS,
	 "count_closed(table, inode) -> bool: one of them was released; False where there was none."},
	{"answer_from", answer_from, METH_VARARGS,
	 "answer_from(table): have this process answer what has a grant in it. Kept for ever."},
	{"drained", drained, METH_NOARGS,
	 "Return how many requests were answered here since the last call, and the opens among them.\n\n"
	 "These are pairs (inode, seconds since the epoch) in the order of the opens."},

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
	if (made && (PyModule_AddIntConstant(made, "sets_background", SETS_BACKGROUND) < 0 || direct_add(made) < 0))
		Py_CLEAR(made);
	return made;
}
