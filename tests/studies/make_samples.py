"""Cut the bundled tiles from Debian's package lomiri-wallpapers-16.04 (20.04.0-2): the same bytes every time.

    apt download lomiri-wallpapers-16.04 && dpkg-deb -x lomiri-wallpapers-16.04_20.04.0-2_all.deb unpacked
    python -m tests.studies.make_samples unpacked/usr/share/backgrounds data/samples

Tiles were chosen by measured sharpness and by eye. `scale` s means that the photograph was reduced s times by area
averaging first, which makes detail that is soft at full size sharp at pixel level. Train and val share no photograph.
"""

import hashlib
import json
import sys
from pathlib import Path

import cv2
import numpy as np

from data.errors import DataError
from data.files import write_atomically
from data.image import encode_jpeg
from data.shards.write import ShardWriter

TILE = 512
PACKAGE = "lomiri-wallpapers-16.04 20.04.0-2 (Debian)"
LICENCES = {
    "CC-BY-4.0": "https://creativecommons.org/licenses/by/4.0/",
    "CC0-1.0": "https://creativecommons.org/publicdomain/zero/1.0/",
}
_AITZOL = ("Aitzol Berasategi", "2018", "CC-BY-4.0")
_FREESPACE = ('Trevor "Freespace"', "2018", "CC-BY-4.0")

# title: (file, (author, year, licence), split, [(scale, top, left) of each tile, px of the reduced photograph])
PHOTOGRAPHS = {
    "friends": ("friends_by_Aitzol_Berasategi.jpg", _AITZOL, "train",
                [(2, 80, 180), (2, 330, 280), (2, 920, 60), (3, 130, 60), (3, 510, 0), (4, 100, 0)]),
    "life": ("life_by_Aitzol_Berasategi.jpg", _AITZOL, "train",
             [(2, 512, 448), (2, 192, 1024), (1, 1472, 992), (2, 32, 0), (1, 928, 1728), (2, 32, 544), (1, 992, 1248),
              (1, 1504, 1472), (1, 832, 2240), (1, 1152, 224)]),
    "picosdeeuropa": ("picosdeeuropa_by_Aitzol_Berasategi.jpg", _AITZOL, "train",
                      [(2, 576, 96), (2, 704, 576), (1, 1824, 544), (2, 256, 1056), (1, 1664, 1056), (1, 640, 1536),
                       (1, 864, 2048), (1, 1184, 1120), (1, 704, 0), (1, 1056, 640)]),
    "picture_1a": ("Picture_1A_by_freespace.jpg", _FREESPACE, "train", [(1, 544, 128), (1, 200, 330), (2, 0, 0)]),
    "sunset": ("sunset_by_Aitzol_Berasategi.jpg", _AITZOL, "train",
               [(2, 896, 448), (2, 768, 1472), (2, 800, 928), (3, 384, 768), (4, 200, 500)]),
    "seeding": ("seeding_by_Clements_Engelhardt.jpg", ("Clemens Engelhardt", "2018", "CC0-1.0"), "train",
                [(2, 224, 576), (1, 608, 768), (1, 448, 1696), (1, 928, 1664), (3, 64, 160), (4, 128, 128)]),
    "aitzgorri": ("aitzgorri_by_Aitzol_Berasategi.jpg", _AITZOL, "val",
                  [(2, 512, 768), (1, 1120, 2080), (1, 800, 2560), (1, 832, 576), (2, 32, 1024)]),
    "picture_0b": ("Picture_0B_by_freespace.jpg", _FREESPACE, "val",
                   [(2, 352, 0), (1, 1216, 544), (2, 0, 480), (1, 1120, 64)]),
    "wine": ("Wine_by_Jakkub_Mede.jpg", ("Jakub Mede", "2018", "CC-BY-4.0"), "val",
             [(4, 440, 0), (4, 240, 100), (5, 0, 0), (5, 255, 0)]),
}  # fmt: skip
SHA256 = {  # of the photographs in the package
    "friends": "cc40e313c74e421edffe3403def413c16878ce14661cce7ec5915baeab35538d",
    "life": "4c119350ead80201fe256850c3d316309ddfb4bdf10b235ce982dcde0c667c05",
    "picosdeeuropa": "414d0072b2f6f2c555deafeaef6e45c4fed6fa9ad26eba6560ca8803959cf97a",
    "picture_1a": "89e86af38d04daaef975665dc2127e9fa76f0fd68f4eea105a2d0ae3390b010b",
    "sunset": "474dab6a4b9f94dc76c29dfe30e9f5db4af0fd2e33fe5d695f8152b371efca18",
    "seeding": "a5634d1ab5e41a3568e92d4a894a500c92b891f9ff734e50bd224d6e185a605f",
    "aitzgorri": "66268e7b48f8854d36a28765fac6e23ec1aee251daa6da1f64715f201020ad36",
    "picture_0b": "c8c0ab18e48d9e0419fe42881112137f3afafc27dfddc29ec3a6d54c56d225ad",
    "wine": "d2e96e6d4da40dd804b3d0ce295e94de04a2d7d9b6785d42cd9d92ba58bced74",
}


def sharpness(tile: np.ndarray) -> tuple[float, float]:
    """(texture, sharpness) of RGB uint8 [H, W, 3], medians over cells of 64 px.

    Texture is the detail below 3 px, in grey levels; sharpness the share of it below 0.8 px, over cells with texture.
    Sharp edges give 0.2 to 0.3, sharp foliage and grass 0.4 to 0.6; a Gaussian blur of 1 px about halves it.
    """
    grey = cv2.cvtColor(tile, cv2.COLOR_RGB2GRAY).astype(np.float32)

    def detail(sigma: float) -> np.ndarray:
        energy = (grey - cv2.GaussianBlur(grey, (0, 0), sigma)) ** 2
        cells = energy[: grey.shape[0] // 64 * 64, : grey.shape[1] // 64 * 64]
        return np.sqrt(cells.reshape(cells.shape[0] // 64, 64, -1, 64).mean(axis=(1, 3)))

    fine, coarse = detail(0.8), detail(3.0)
    textured = coarse > 4
    return float(np.median(coarse)), float(
        np.median((fine / np.maximum(coarse, 1e-3))[textured])
    ) if textured.any() else 0.0


def load(folder: Path, title: str) -> np.ndarray:
    """A photograph of the package, RGB uint8; DataError where it is not the very file the tiles were chosen on."""
    path = folder / PHOTOGRAPHS[title][0]
    if not path.is_file():
        raise DataError(f"{path}: missing; give the folder usr/share/backgrounds of {PACKAGE}, unpacked")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != SHA256[title]:
        raise DataError(f"{path}: not the file of {PACKAGE} (its sha256 differs); unpack that version")
    return cv2.cvtColor(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB)


def tiles(folder: Path, split: str):
    """Yield (key, RGB tile, facts about it) of one split, photographs in turn."""
    for title, (file, (author, year, licence), where, boxes) in PHOTOGRAPHS.items():
        if where != split:
            continue
        photograph = load(folder, title)
        for number, (scale, top, left) in enumerate(boxes):
            size = (photograph.shape[1] // scale, photograph.shape[0] // scale)
            reduced = cv2.resize(photograph, size, interpolation=cv2.INTER_AREA) if scale > 1 else photograph
            tile = np.ascontiguousarray(reduced[top : top + TILE, left : left + TILE])
            assert tile.shape == (TILE, TILE, 3), (title, number, tile.shape)
            texture, sharp = sharpness(tile)
            facts = {"photograph": title, "file": file, "author": author, "year": year, "licence": licence,
                     "licence_url": LICENCES[licence], "source": PACKAGE, "scale": scale,
                     "box": [top, left, TILE, TILE],
                     "texture": round(texture, 2), "sharpness": round(sharp, 3)}  # fmt: skip
            yield f"{title}_{number:02d}", tile, facts


def attribution() -> str:
    """ATTRIBUTION.md: who made each photograph, under which licence, and what was done to it."""
    lines = [
        "# Bundled photographs",
        "",
        f"From {PACKAGE}; its copyright file names authors and licences.",
        f"Changes: cut into tiles of {TILE} px, some after reduction by area averaging (`scale` in each tile's json),",
        "re-encoded as JPEG quality 95, 4:4:4; tests/studies/make_samples.py does it to the byte. The tiles keep the",
        "licences of their photographs; the project's own licence does not cover them.",
        "",
        "| photograph | author | licence | split | tiles |",
        "|---|---|---|---|---|",
    ]
    for title, (file, (author, year, licence), split, boxes) in PHOTOGRAPHS.items():
        lines.append(
            f"| {title} (`{file}`) | {author}, {year} | [{licence}]({LICENCES[licence]}) | {split} | {len(boxes)} |"
        )
    return "\n".join(lines) + "\n"


def main(folder: str, out: str) -> None:
    """Write train/, val/ and ATTRIBUTION.md under `out`."""
    for split in ("train", "val"):
        info = {"name": f"bundled-{split}", "source": PACKAGE, "licence": "CC-BY-4.0 and CC0-1.0, see ATTRIBUTION.md"}
        with ShardWriter(Path(out) / split, prefix=split, shard_bytes=3 << 20, info=info) as writer:
            for key, tile, facts in tiles(Path(folder), split):
                facts_json = json.dumps(facts, ensure_ascii=False, sort_keys=True).encode()
                writer.add(key, {"jpg": encode_jpeg(tile, 95), "json": facts_json})
    write_atomically(Path(out) / "ATTRIBUTION.md", attribution().encode())


if __name__ == "__main__":
    main(*sys.argv[1:])
