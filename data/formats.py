"""Which files are pictures, and which are nobody's, by their names."""

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")


_JUNK = {"__macosx", "thumbs.db", "desktop.ini", "@eadir"}


def is_junk(path: str) -> bool:
    """Whether a path is what systems leave behind: hidden files and folders, `._x.png` of macOS, thumbnails."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return not parts or any(part.startswith(".") or part.lower() in _JUNK for part in parts)


def is_image(name: str) -> bool:
    """Whether a file name or a member's extension (jpg, sharp.png) says image."""
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES
