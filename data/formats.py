"""Which files are pictures, by their names."""

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff")


def is_image(name: str) -> bool:
    """Whether a file name or a member's extension (jpg, sharp.png) says image."""
    return name.rpartition(".")[2].lower() in IMAGE_SUFFIXES
