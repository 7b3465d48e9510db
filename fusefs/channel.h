/* What the parts of the extension `_channel` have of each other. */
#ifndef SLUICE_CHANNEL_H
#define SLUICE_CHANNEL_H

#define PY_SSIZE_T_CLEAN
#define FUSE_USE_VERSION 31
#include <Python.h>
#include <fuse3/fuse_lowlevel.h>
#include <linux/fuse.h>
#include <stddef.h>
#include <stdint.h>

#define UNIQUE_RESEND (UINT64_C(1) << 63) /* FUSE_UNIQUE_RESEND of newer headers. */

/* The kernel's fuse_open_out. Older headers lack the last. */
struct open_out {
	uint64_t fh;
	uint32_t open_flags;
	int32_t backing_id;
};

/* channel.c: answer a request that Python need not see; return whether it was one. */
int answer_here(int device, const void *request, size_t length);

/* grants.c: answer an open or a release of an inode that has a grant; return whether it was one. */
int answer_granted(int device, const void *request, size_t length);

/* direct.c, all of it with the interpreter lock: return whether the request is answered, now or later; else it
 * goes the usual way. */
int direct_answer(int device, const void *request, size_t length);

/* Return whether there is a request, or comes within *linger_ns*. Has the mover's answers taken meanwhile. */
int direct_wait(int session_fd, long linger_ns);

/* Add to the module what Python calls; return 0, or -1 with an exception set. */
int direct_add(PyObject *module);
int written_add(PyObject *module);

/* direct.c: return 0, or -1 where nobody waits for the answer any more. */
int send_reply(int device, uint64_t unique, int error, const void *body, size_t length);

/* written.c: answer a request for a file that was made here and is written to; return whether it is answered. */
int written_answer(int device, const struct fuse_in_header *in, size_t length);

/* counted.c: count the first open of *inode*, for writing; return whether that was possible. */
int count_first(uint64_t inode, uint64_t request, int answered_cached);

/* Count the close of the only open of *inode*; return whether it was that. */
int count_last(uint64_t inode, uint64_t request);

/* Return whether somebody has it open for writing. */
int has_writers(uint64_t inode);

/* Keep the counts of *inode* as they are, if somebody writes to it and nobody has to be waited for. Return whether
 * it is so. */
int hold_writers(uint64_t inode);
void let_go_writers(uint64_t inode);

/* Answer a request that was left for later: *result* is bytes or an errno. -1 where nobody waits for it any more, or
 * with an exception set. */
int direct_send(int device, uint64_t unique, PyObject *result);

/* reads.c: where READs are answered from now on. */
void reads_on(int device);

/* receiver.c: as libfuse's, where a thread receives. */
int receive_from_thread(struct fuse_session *session, struct fuse_buf *buffer);

/* The device of a session whose descriptor is *fd*: that is another file where a thread receives. */
int device_of(int fd);

/* Return the descriptor of the device from now on, or -1 with an exception set. */
int start_receiving(int fd, size_t request_bytes);

int is_receiving(void);

extern PyMethodDef counted_methods[], grants_methods[], reads_methods[];

#endif
