/* A thread of each worker that receives requests, where several workers share the device.
 *
 * The kernel wakes all who poll the device for every request, but only one of those who wait in read(2).
 * So a thread does that, without the interpreter's lock. It answers what needs no Python, also while Python
 * is busy. Of what does it keeps one request for Python, and has one more in its hands at most: what comes
 * then is another worker's. One worker by itself has no use for it: waking Python by way of a thread takes
 * 10 us more than by way of the device.
 *
 * pyfuse3 waits until the session's descriptor is readable. Here that number stands for an eventfd, readable
 * while a request is kept, and the device has another one, which libfuse's hook for its I/O writes to.
 *
 * The thread ends with its process, or when the mount is gone.
 */
#define _GNU_SOURCE
#include "channel.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

static struct {
	pthread_mutex_t lock;
	pthread_cond_t taken;
	int session_fd; /* The eventfd: readable while there is something to take. */
	int device;	/* -1: no thread receives. */
	size_t size;	/* Of each buffer. */
	void *request;
	ssize_t length; /* 0: there is none. Below it is the error that the thread ended with. */
	int is_full;	/* The thread has another one. */
} kept = {PTHREAD_MUTEX_INITIALIZER, PTHREAD_COND_INITIALIZER, -1, -1, 0, NULL, 0, 0};

int is_receiving(void)
{
	return kept.device >= 0;
}

int device_of(int fd)
{
	return is_receiving() && fd == kept.session_fd ? kept.device : fd;
}

/* Keep what was read, once Python took what was kept before; return a buffer for the next. */
static void *keep(void *request, ssize_t length)
{
	void *spare;

	pthread_mutex_lock(&kept.lock);
	while (kept.length) {
		kept.is_full = 1;
		pthread_cond_wait(&kept.taken, &kept.lock);
	}
	kept.is_full = 0;
	spare = kept.request;
	kept.request = request;
	kept.length = length;
	pthread_mutex_unlock(&kept.lock);
	eventfd_write(kept.session_fd, 1);
	return spare;
}

static void *receive(void *buffer)
{
	for (;;) {
		ssize_t length = read(kept.device, buffer, kept.size);

		if (length > 0) {
			if (!answer_here(kept.device, buffer, (size_t)length))
				buffer = keep(buffer, length);
		} else if (!length || (errno != EINTR && errno != EAGAIN && errno != ENOENT)) {
			/* ENOENT: its sender had gone. */
			keep(buffer, length ? -errno : -EIO);
			return NULL;
		}
	}
}

int receive_from_thread(struct fuse_session *session, struct fuse_buf *buffer)
{
	void *spare = buffer->mem ? buffer->mem : malloc(kept.size);
	ssize_t length;
	eventfd_t unused;
	int is_full = 0;

	if (!spare)
		return -ENOMEM;
	pthread_mutex_lock(&kept.lock);
	length = kept.length;
	if (length >= 0) /* An error stays readable. */
		eventfd_read(kept.session_fd, &unused);
	if (length > 0) {
		buffer->mem = kept.request;
		buffer->size = (size_t)length;
		buffer->flags = 0;
		kept.request = spare;
		kept.length = 0;
		is_full = kept.is_full;
	} else {
		buffer->mem = spare;
	}
	pthread_mutex_unlock(&kept.lock);
	if (is_full)
		pthread_cond_signal(&kept.taken);
	if (length == -ENODEV) {
		fuse_session_exit(session);
		return 0;
	}
	return length ? (int)length : -EINTR;
}

/* Return the device's new number; the old one is the eventfd's. -1 with errno set. */
static int exchange_descriptors(int fd)
{
	int device = fcntl(fd, F_DUPFD_CLOEXEC, 3), event = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);

	if (device >= 0 && event >= 0 && dup3(event, fd, O_CLOEXEC) >= 0) {
		close(event);
		return device;
	}
	if (device >= 0)
		close(device);
	if (event >= 0)
		close(event);
	return -1;
}

static int start_thread(void *buffer)
{
	pthread_t thread;
	sigset_t all, before;
	int code;

	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before); /* Signals are Python's. */
	code = pthread_create(&thread, NULL, receive, buffer);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	if (!code)
		pthread_detach(thread);
	return code;
}

int start_receiving(int fd, size_t request_bytes)
{
	void *buffer = malloc(request_bytes);

	kept.size = request_bytes;
	kept.request = malloc(request_bytes);
	if (!buffer || !kept.request) {
		free(buffer);
		free(kept.request);
		PyErr_NoMemory();
		return -1;
	}
	kept.session_fd = fd;
	kept.device = exchange_descriptors(fd);
	if (kept.device >= 0 && !(errno = start_thread(buffer)))
		return kept.device;
	PyErr_SetFromErrno(PyExc_OSError); /* The process is of no use now: it is replaced. */
	return -1;
}
