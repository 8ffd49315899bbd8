"""The one exception family of fmclip.

Every message is written for the person at the screen: what was wrong, where, and what to do about it. No message
holds a file name, a path or a DICOM tag: scans are called by their place in the upload ("scan 3").
"""


class FmclipError(Exception):
    """Base class of all errors that fmclip raises on purpose; its text can be shown to a user as it stands."""


class ScanError(FmclipError):
    """A file cannot be read as a scan."""


class ReferenceSetError(FmclipError):
    """The set of normal reference scans cannot be learned from (too few, too many, constant)."""


class TowerError(FmclipError):
    """A tower is unknown, cannot be loaded, or cannot do what a method asks of it."""


class CheckpointError(FmclipError):
    """An adapter file is damaged, of another version, or was made for another tower."""


class PairError(FmclipError):
    """Image-text pairs, their split, or the settings or files of a run of contrastive training cannot be used."""


class ExportError(FmclipError):
    """A detector cannot be written as a graph, or the file does not answer as the detector does."""


class ArchiveError(FmclipError):
    """An archive of scans, its manifest, or the folder of its scores cannot be used."""


class DeviceShortage(FmclipError):  # noqa: N818  (named for what is short)
    """A fit needs more memory than the device that it was given; the processor may have it."""


class NotFittedError(FmclipError):
    """`predict` was called before `fit` or `load`."""


class Stopped(Exception):  # noqa: N818  (a signal, not an error: the person pressed Stop)
    """Raised out of `on_event` to end training early; the detector keeps its last good state."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so; on a CPU torch raises a plain RuntimeError."""
    is_hosts = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
    return is_hosts or is_out_of_device_memory(error)


def is_out_of_device_memory(error: BaseException) -> bool:
    """Whether it is the memory of a GPU that ran out, not the host's, which a fit on the processor needs as well."""
    return type(error).__name__ == "OutOfMemoryError"
