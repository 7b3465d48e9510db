"""The one exception tree. `fusefs/operations.py` maps it to errno, `tools/cli.py` to exit statuses."""


class SluiceError(Exception):
    """Anything that went wrong and has a one-line explanation in `str(error)`."""


class UsageError(SluiceError):
    """Bad input. The text names the option or file, the value, and the mend. Exit status 2."""


class LakeError(SluiceError):
    """The lake refused or failed."""


class LakeUnavailable(LakeError):
    """Network failure, time-out or 5xx. The same request may succeed later; retried."""


class SlowDown(LakeUnavailable):
    """The lake asks for fewer requests (503 SlowDown, 429). Retried after a longer wait."""


class TruncatedBody(LakeUnavailable):
    """Fewer bytes arrived than were promised. Retried; never passed on as a short file."""


class BodyBroken(LakeUnavailable):
    """What arrived at the lake is not what was sent. Sent again; what goes on breaking is refused."""


class ObjectMissing(LakeError):
    """There is no such key (404). Never retried."""


class ObjectChanged(LakeError):
    """The object no longer has the ETag that was asked for (412). Never retried."""


class ObjectExists(LakeError):
    """A conditional create found the key taken (412 on If-None-Match). Never retried."""


class AccessDenied(LakeError):
    """The credentials do not allow this (403), or the object is archived. Never retried."""


class LakeMisconfigured(LakeError):
    """No such bucket, wrong region, wrong credentials, bad TLS, endpoint that is no S3. Never retried."""


class CacheError(SluiceError):
    """The cache directory failed. A read that meets this asks the lake instead."""


class CacheFull(CacheError):
    """No space could be made for the bytes: budget, free-space guard or ENOSPC."""


class BlockCorrupt(CacheError):
    """A block's checksum does not match its bytes: drop it and fetch it again."""


class MoverUnavailable(SluiceError):
    """The mover did not answer and could not be reached again in time."""


class NamespaceError(SluiceError):
    """A change of the namespace is refused as POSIX says; nothing has changed."""


class NameExists(NamespaceError):
    """The name is taken (EEXIST)."""


class NameMissing(NamespaceError):
    """There is no such name (ENOENT)."""


class NotADirectory(NamespaceError):
    """A directory was needed (ENOTDIR)."""


class IsADirectory(NamespaceError):
    """Anything but a directory was needed (EISDIR)."""


class DirectoryNotEmpty(NamespaceError):
    """The directory has entries (ENOTEMPTY)."""


class NameRefused(NamespaceError):
    """The lake can't hold an object of this name (EINVAL)."""


class TextRefused(NamespaceError):
    """Nothing of what was written to a control file is of use (EINVAL)."""


class NameTooLong(NamespaceError):
    """The name or the whole key is longer than the lake allows (ENAMETOOLONG)."""


class FileTooLarge(NamespaceError):
    """The size is above what one object of the lake may have (EFBIG)."""


class AttributeMissing(NamespaceError):
    """There is no such extended attribute (ENODATA)."""


class NotSupported(NamespaceError):
    """A lake has no such thing: hard links, device nodes (EOPNOTSUPP)."""


class MountReadOnly(SluiceError):
    """Nothing can be changed (EROFS): asked for, or the journal failed and the log says why."""


class StagingFull(SluiceError):
    """The disk of the staging files is full (ENOSPC)."""
