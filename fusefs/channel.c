/* What SluiceFS needs of libfuse and pyfuse3 does not expose.
 *
 * This library is loaded with RTLD_GLOBAL before pyfuse3, so that pyfuse3's calls of the three
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
 * fuse_session_new
 *   INIT's reply carries how many requests that nobody waits for, reads ahead among them, may be
 *   under way. libfuse leaves the kernel's 12, which is fewer than the readers of one training
 *   job. Splicing is turned off: small requests are copied faster than they go through a pipe.
 *
 * fuse_reply_open
 *   pyfuse3's opendir can't ask the kernel to keep a directory's entries. Two high bits of the
 *   handle say it here: the kernel may cache them, and what it has cached already is still good.
 *
 * All state is set once, before the fork. Wire format: linux/fuse.h, a stable ABI.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define FUSE_USE_VERSION 31
#include <Python.h>
#include <dlfcn.h>
#include <errno.h>
#include <fuse3/fuse_lowlevel.h>
#include <linux/fuse.h>
#include <string.h>

#define MAX_BACKGROUND 256
#define CONGESTION_THRESHOLD 192
#define CACHE_ENTRIES (UINT64_C(1) << 60) /* Of a directory handle, as in operations.py. */
#define KEEP_ENTRIES (UINT64_C(1) << 61)

typedef int receive_function(struct fuse_session *, struct fuse_buf *);

typedef int reply_open_function(fuse_req_t, const struct fuse_file_info *);

static receive_function *receive_of_libfuse;
static reply_open_function *reply_open_of_libfuse;

static void name_inode_as_handle(struct fuse_buf *buffer, int length)
{
	struct fuse_in_header *in = buffer->mem;
	struct fuse_read_in *arg = (struct fuse_read_in *)(in + 1);

	if ((buffer->flags & FUSE_BUF_IS_FD) || length < (int)(sizeof(*in) + sizeof(*arg)))
		return;
	if (in->opcode == FUSE_READ && arg->fh == 0)
		arg->fh = in->nodeid;
}

int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buffer)
{
	int result = receive_of_libfuse(session, buffer);

	if (result > 0)
		name_inode_as_handle(buffer, result);
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

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_channel",
	.m_doc = "Changes three calls of pyfuse3 into libfuse; see channel.c. Import with RTLD_GLOBAL, first.",
	.m_size = -1,
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
	if (!reply_open_of_libfuse || reply_open_of_libfuse == fuse_reply_open)
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
	if (made && PyModule_AddIntConstant(made, "sets_background", SETS_BACKGROUND) < 0)
		Py_CLEAR(made);
	return made;
}
