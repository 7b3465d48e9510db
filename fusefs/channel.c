/* What pyfuse3 needs to serve one session from several processes.
 *
 * All workers wait for the same device to become readable. The kernel wakes all of them for one
 * request; one gets it, and the others would block in read(2) with their answers unsent. So the
 * supervisor sets O_NONBLOCK on the device, and the loser's read fails with EAGAIN. libfuse passes
 * that on as -EAGAIN (lib/fuse_lowlevel.c, fuse_session_receive_buf: "EAGAIN (nonblocking I/O)"),
 * which pyfuse3 takes for a failure of the session, while it takes -EINTR for "wait again".
 *
 * This library is loaded with RTLD_GLOBAL before pyfuse3, so that pyfuse3's call binds to the
 * function below, which turns the one into the other.
 */
#define _GNU_SOURCE
#define PY_SSIZE_T_CLEAN
#define FUSE_USE_VERSION 31
#include <Python.h>
#include <dlfcn.h>
#include <errno.h>
#include <fuse3/fuse_lowlevel.h>

typedef int receive_function(struct fuse_session *, struct fuse_buf *);

static receive_function *receive_of_libfuse;

int fuse_session_receive_buf(struct fuse_session *session, struct fuse_buf *buffer)
{
	int result = receive_of_libfuse(session, buffer);

	return result == -EAGAIN ? -EINTR : result;
}

static struct PyModuleDef module = {
	PyModuleDef_HEAD_INIT,
	.m_name = "_channel",
	.m_doc = "Turns EAGAIN on the FUSE device into \"wait again\". Import before pyfuse3, RTLD_GLOBAL.",
	.m_size = -1,
};

PyMODINIT_FUNC PyInit__channel(void)
{
	void *libfuse = dlopen("libfuse3.so.3", RTLD_NOW | RTLD_LOCAL);

	if (!libfuse) {
		PyErr_SetString(PyExc_ImportError, dlerror());
		return NULL;
	}
	receive_of_libfuse = (receive_function *)dlsym(libfuse, "fuse_session_receive_buf");
	if (!receive_of_libfuse || receive_of_libfuse == fuse_session_receive_buf) {
		PyErr_SetString(PyExc_ImportError, "libfuse3 has no fuse_session_receive_buf");
		return NULL;
	}
	return PyModule_Create(&module);
}
