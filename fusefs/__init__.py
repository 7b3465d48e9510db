"""The filesystem that the kernel talks to: supervisor, workers and POSIX verbs."""
