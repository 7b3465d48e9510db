"""From exceptions to errno: the only errno table, and the only place that catches everything.

pyfuse3 ends the mount when a handler raises anything but FUSEError, so every handler is `guarded`.
"""

from __future__ import annotations

import errno
import functools
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

import pyfuse3

from cache import errors
from cache.counters import CounterRow

log = logging.getLogger(__name__)
P = ParamSpec("P")
T = TypeVar("T")

# The first class that fits counts. ESTALE makes the kernel look the path up again (open(2) is
# then tried once more with the new inode), which is right when the lake holds another version.
ERRNO_OF = (
    (errors.ObjectChanged, errno.ESTALE),
    (errors.ObjectMissing, errno.ESTALE),
    (errors.AccessDenied, errno.EACCES),
    (errors.CacheFull, errno.ENOSPC),
    (errors.StagingFull, errno.ENOSPC),
    (errors.MountReadOnly, errno.EROFS),
    (errors.NameExists, errno.EEXIST),
    (errors.NameMissing, errno.ENOENT),
    (errors.NotADirectory, errno.ENOTDIR),
    (errors.IsADirectory, errno.EISDIR),
    (errors.DirectoryNotEmpty, errno.ENOTEMPTY),
    (errors.NameRefused, errno.EINVAL),
    (errors.TextRefused, errno.EINVAL),
    (errors.NameTooLong, errno.ENAMETOOLONG),
    (errors.FileTooLarge, errno.EFBIG),
    (errors.AttributeMissing, errno.ENODATA),
    (errors.NotSupported, errno.EOPNOTSUPP),
    (errors.SluiceError, errno.EIO),
)


class Counting(Protocol):
    counters: CounterRow


S = TypeVar("S", bound=Counting)


def errno_of(error: Exception) -> int:
    return next((code for kind, code in ERRNO_OF if isinstance(error, kind)), errno.EIO)


Handler = Callable[Concatenate[S, P], Coroutine[Any, Any, T]]


def guarded(handler: Handler[S, P, T]) -> Handler[S, P, T]:
    """Have *handler* raise FUSEError only. What was refused as POSIX says is no error to count."""

    @functools.wraps(handler)
    async def guard(self: S, *args: P.args, **kwargs: P.kwargs) -> T:
        self.counters.add("requests")
        try:
            return await handler(self, *args, **kwargs)
        except pyfuse3.FUSEError:
            raise
        except errors.NamespaceError as error:
            raise pyfuse3.FUSEError(errno_of(error)) from error
        except errors.SluiceError as error:
            self.counters.add("errors")
            code = errno_of(error)
            if code == errno.EIO:
                log.error("%s: %s", handler.__name__, error)
            raise pyfuse3.FUSEError(code) from error
        except Exception as error:
            self.counters.add("errors")
            log.exception("%s failed", handler.__name__)
            raise pyfuse3.FUSEError(errno.EIO) from error

    return cast("Handler[S, P, T]", guard)
