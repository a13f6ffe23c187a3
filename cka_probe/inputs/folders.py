"""Which files of a folder are images, and which are left out."""

import mimetypes
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from cka_probe.errors import first_names, one_line
from cka_probe.inputs.decode import readable_formats

__all__ = ["Listing", "is_left_behind", "list_folder"]

# Folders that systems, network drives and archivers leave behind (hidden ones begin with a dot).
_LEFT_BEHIND = frozenset(
    {"__macosx", "@eadir", "@recycle", "#recycle", "$recycle.bin", "lost+found"}
    | {"system volume information", "thumbnails", "__pycache__"}
)
_LEFT_FILES = frozenset({"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"})
# Raw files of cameras, and JPEG XL, which `mimetypes` does not know.
_CAMERA = frozenset({".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".rw2", ".orf", ".jxl"})


def is_left_behind(name: str) -> bool:
    """Whether a file or folder is hidden, or was put there by a system and not by the user."""
    return name.startswith(".") or name.lower() in _LEFT_BEHIND | _LEFT_FILES


@dataclass(frozen=True)
class Listing:
    """What a folder holds.

    Attributes:
        images: relative POSIX paths of image files, sorted.
        others: those of all other files, pipes and devices.
        left_behind: those of what systems leave behind, such as `__MACOSX`; not of hidden ones.
    """

    images: list[str]
    others: list[str]
    left_behind: list[str]

    def skipped(self) -> str:
        """What was not read, in one line; empty where everything was."""
        parts = []
        for names, what in (
            (self.others, "no image files that Pillow reads here"),
            (self.left_behind, "left by a system"),
        ):
            if names:
                parts.append(f"{first_names([repr(name) for name in names], 3)} ({what})")
        return "; ".join(parts)

    def unread_images(self) -> list[str]:
        """Files whose ending says that they are images, yet Pillow does not read them here."""
        types = ((name, mimetypes.guess_type(name)[0]) for name in self.others)
        return [
            name
            for name, kind in types
            if (kind or "").startswith("image/") or Path(name).suffix.lower() in _CAMERA
        ]


def list_folder(root: Path) -> Listing:
    """Find the image files under a folder.

    Links are followed, but never in a circle. A broken link counts as a file, so that it is named.

    Args:
        root: the folder, flat or nested.

    Raises:
        ValueError: it is missing, a file, cannot be listed, or has no images.
    """
    if not root.is_dir():
        what = "not a folder" if root.exists() else "no such folder"
        raise ValueError(f"{what}: {str(root)!r}: give the folder that holds the images")
    endings = readable_formats()
    images: list[str] = []
    others: list[str] = []
    left: list[str] = []

    def walk(folder: Path, prefix: str, above: tuple[tuple[int, int], ...]) -> None:
        """Sort what is in a folder; `above` is (device, inode) of the folders above."""
        status = folder.stat()
        here = (status.st_dev, status.st_ino)
        if here in above:
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if is_left_behind(entry.name):
                    if not entry.name.startswith("."):
                        left.append(prefix + entry.name)
                elif entry.is_dir():
                    walk(folder / entry.name, f"{prefix}{entry.name}/", (*above, here))
                elif Path(entry.name).suffix.lower() in endings and not _is_special(entry):
                    images.append(prefix + entry.name)
                else:
                    others.append(prefix + entry.name)

    try:
        walk(root, "", ())
    except OSError as error:
        reason = f"{one_line(error)}; check its permissions"
        raise ValueError(f"cannot list folder: {str(root)!r}: {reason}") from error
    found = Listing(sorted(images), sorted(others), sorted(left))
    if not found.images:
        there = f" but {found.skipped()}" if found.skipped() else ""
        hint = "give one with files that Pillow reads: .jpg .png .webp .tif ..."
        raise ValueError(f"no images in folder: {str(root)!r}{there}: {hint}")
    return found


def _is_special(entry: os.DirEntry[str]) -> bool:
    """Whether it is a pipe, socket or device, of which a read may never end."""
    try:
        return not stat.S_ISREG(entry.stat().st_mode)
    except FileNotFoundError:  # a broken link: it is named when it is read
        return False
