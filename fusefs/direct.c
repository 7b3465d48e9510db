/* Requests that Python answers at once: in the call that receives them, without pyfuse3 and without trio.
 *
 * A request that goes the usual way costs some 60 to 100 us besides what is done for it: it wakes trio, starts a
 * coroutine, and each of its replies is made of objects. Who makes a file makes six requests. So direct.py,
 * which knows the wire format, gets those kinds first that seldom have to wait for anything:
 *
 *   its callable is given the request and returns the body of the reply, a number (0: done, with nothing to say,
 *   else the errno), LATER, TAKEN (reads.c answers it), or None: then the request goes the usual way, as if nobody
 *   had looked at it.
 *
 * Before that written.c is asked, which answers for files that were made here without Python.
 *
 * After LATER the reply is given with reply(). What it waits for comes from the mover: its socket is
 * waited for here beside the device, and what arrives there is taken by a second callable, again without trio. While
 * an answer is on its way, or requests come one upon the other, the next is waited for here: see channel.c.
 *
 * Called with the interpreter lock. All state is the process's own, a worker's. Wire format: linux/fuse.h.
 */
#define _GNU_SOURCE
#include "channel.h"

#include <errno.h>
#include <poll.h>
#include <sys/uio.h>
#include <time.h>

#define LENGTH_MAX (80 << 10) /* Longer writes are a thread's, see writing.py. */
#define LATER (-1)
#define TAKEN (-2)
#define LATER_NS 500000L /* So long the mover's answer is waited for here: making a file takes it less. */
#define TAKEN_MAX 64

static PyObject *answer; /* (opcode, unique, inode, uid, gid, body) -> bytes | int | None */
static PyObject *take;	 /* () -> bool: whether the socket is good for more */
static int mover_fd = -1;
static int device_fd = -1;
static unsigned awaited; /* Requests whose answer comes later. */

static int is_direct(uint32_t opcode)
{
	switch (opcode) {
	case FUSE_LOOKUP:
	case FUSE_GETATTR:
	case FUSE_SETATTR:
	case FUSE_READ:
	case FUSE_CREATE:
	case FUSE_WRITE:
	case FUSE_RELEASE:
		return 1;
	}
	return 0;
}

int send_reply(int device, uint64_t unique, int error, const void *body, size_t length)
{
	struct fuse_out_header out = {(uint32_t)(sizeof(out) + length), -error, unique};
	struct iovec pieces[] = {{&out, sizeof(out)}, {(void *)body, length}};

	return writev(device, pieces, length ? 2 : 1) < 0 ? -1 : 0;
}

int direct_send(int device, uint64_t unique, PyObject *result)
{
	long error;

	if (PyBytes_Check(result))
		return send_reply(device, unique, 0, PyBytes_AS_STRING(result), (size_t)PyBytes_GET_SIZE(result));
	error = PyLong_AsLong(result);
	if (PyErr_Occurred())
		return -1;
	return send_reply(device, unique, (int)error, NULL, 0);
}

/* A number that means something else than an errno. */
static int is_number(PyObject *result, long number)
{
	return PyLong_Check(result) && PyLong_AsLong(result) == number;
}

int direct_answer(int device, const void *request, size_t length)
{
	const struct fuse_in_header *in = request;
	PyObject *result;
	int is_answered = 1;

	if (!answer || length < sizeof(*in) || !is_direct(in->opcode) || (in->unique & UNIQUE_RESEND))
		return 0;
	if (written_answer(device, in, length))
		return 1;
	if (length > LENGTH_MAX)
		return 0;
	device_fd = device;
	reads_on(device);
	result = PyObject_CallFunction(answer, "IKKIIy#", in->opcode, (unsigned long long)in->unique,
				       (unsigned long long)in->nodeid, in->uid, in->gid,
				       (const char *)(in + 1), (Py_ssize_t)(length - sizeof(*in)));
	if (!result || result == Py_None)
		is_answered = 0;
	else if (is_number(result, LATER))
		awaited++;
	else if (!is_number(result, TAKEN))
		direct_send(device, in->unique, result);
	if (PyErr_Occurred())
		PyErr_WriteUnraisable(answer);
	Py_XDECREF(result);
	return is_answered;
}

static int take_from_mover(void)
{
	PyObject *result = PyObject_CallNoArgs(take);
	int is_good = result && PyObject_IsTrue(result) > 0;

	if (PyErr_Occurred())
		PyErr_WriteUnraisable(take);
	Py_XDECREF(result);
	return is_good;
}

int direct_wait(int session_fd, long linger_ns)
{
	struct pollfd fds[] = {{session_fd, POLLIN, 0}, {mover_fd, POLLIN, 0}};
	int ready;

	for (int taken = 0; taken < TAKEN_MAX; taken++) {
		struct timespec linger = {0, awaited ? LATER_NS : linger_ns};

		fds[1].fd = mover_fd; /* -1 is left out. */
		Py_BEGIN_ALLOW_THREADS
		ready = ppoll(fds, 2, &linger, NULL);
		Py_END_ALLOW_THREADS
		if (ready <= 0)
			return 0;
		if (fds[1].revents && !take_from_mover())
			return 0;
		if (fds[0].revents)
			return (fds[0].revents & POLLIN) != 0;
	}
	return 0;
}

static PyObject *answer_directly(PyObject *self, PyObject *args)
{
	PyObject *answering, *taking;

	(void)self;
	if (!PyArg_ParseTuple(args, "OO", &answering, &taking))
		return NULL;
	Py_XSETREF(answer, Py_NewRef(answering));
	Py_XSETREF(take, Py_NewRef(taking));
	Py_RETURN_NONE;
}

static PyObject *wait_for_mover(PyObject *self, PyObject *args)
{
	(void)self;
	if (!PyArg_ParseTuple(args, "i", &mover_fd))
		return NULL;
	Py_RETURN_NONE;
}

static PyObject *reply(PyObject *self, PyObject *args)
{
	unsigned long long unique;
	PyObject *result;
	int failed;

	(void)self;
	if (!PyArg_ParseTuple(args, "KO", &unique, &result))
		return NULL;
	if (awaited)
		awaited--;
	failed = direct_send(device_fd, unique, result);
	return PyErr_Occurred() ? NULL : PyBool_FromLong(!failed);
}

static PyObject *reply_read(PyObject *self, PyObject *args)
{
	unsigned long long unique;
	PyObject *result;
	int failed;

	(void)self;
	if (!PyArg_ParseTuple(args, "KO", &unique, &result))
		return NULL;
	failed = direct_send(device_fd, unique, result);
	return PyErr_Occurred() ? NULL : PyBool_FromLong(!failed);
}

static PyMethodDef methods[] = {
	{"answer_directly", answer_directly, METH_VARARGS,
	 "answer_directly(answer, take): have this process's requests given to *answer* first.\n\n"
	 "*take* is called when the mover's socket is readable; it returns whether to wait for that further."},
	{"wait_for_mover", wait_for_mover, METH_VARARGS,
	 "wait_for_mover(fd): the mover's socket; -1 for none. To be called before it is closed."},
	{"reply", reply, METH_VARARGS,
	 "reply(unique, result) -> bool: answer a request that was left for later; False where nobody waits."},
	{"reply_read", reply_read, METH_VARARGS,
	 "reply_read(unique, result) -> bool: the same of a READ that was taken, and failed."},
	{0},
};

int direct_add(PyObject *module)
{
	if (PyModule_AddIntConstant(module, "LATER", LATER) < 0 || PyModule_AddIntConstant(module, "TAKEN", TAKEN) < 0)
		return -1;
	return PyModule_AddFunctions(module, methods);
}
