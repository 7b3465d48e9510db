/* Requests that Python answers at once, see direct.c. */
#ifndef SLUICE_DIRECT_H
#define SLUICE_DIRECT_H

#include <Python.h>
#include <fuse3/fuse_lowlevel.h>

/* Return whether the request is answered by this, now or later; else it goes the usual way. */
int direct_answer(struct fuse_session *session, const struct fuse_buf *buffer, size_t length);

/* Return whether there is a request, or comes within *linger_ns*. Has the mover's answers taken meanwhile. */
int direct_wait(struct fuse_session *session, long linger_ns);

/* Add to the module what Python calls; return 0, or -1 with an exception set. */
int direct_add(PyObject *module);

#endif
