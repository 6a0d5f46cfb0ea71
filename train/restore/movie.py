"""Video files in pieces: which frames there are, their pixels, pieces of restored frames, and the whole with its sound.

Every frame keeps its own time stamp, so that a varying rate stays what it is. Pieces are H.264 without B-frames: then
the order of packets is that of frames, and pieces of one encoder join packet by packet.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from data.files import replacing
from train.log import log
from train.restore.picture import PictureError

FORMATS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska"}
QUALITY = {"crf": "16", "preset": "medium", "bf": "0"}  # x264: hardly to be told from lossless
BT709, BT601, FULL_HD_FROM = 1, 5, 720  # a video that does not say its matrix has BT.709 from 720 rows on
# swscale, bicubic, by FFmpeg's numbers: its shortcuts, which are the default, make luma darker by a level.
EXACT = 0x4 | 0x2000 | 0x4000 | 0x40000  # bicubic, every chroma sample in and out, right rounding
HDR = {16: "PQ", 18: "HLG"}


@dataclass(frozen=True)
class Film:
    """A video's frames: the time stamps in display order, in units of `base` seconds; mean rate; the colours' codes
    (matrix, primaries, transfer); whether its chroma is not subsampled; stored size (width, height), px; width by
    height of one stored pixel, where it says so."""

    path: Path
    stamps: tuple[int, ...]
    base: Fraction
    rate: Fraction
    colours: tuple[int, int, int]
    full_chroma: bool
    size: tuple[int, int]
    aspect: Fraction | None = None


def open_film(path: Path) -> Film:
    """Look through a video's packets, decoding none. PictureError where that is no video, or one that cannot be kept
    as it is."""
    if path.exists() and not path.is_file():  # a named pipe would be waited for
        raise PictureError(f"{path}: is no file, but a folder, a pipe or a device")
    try:
        with _opened(path) as container:
            stream = container.streams.video[0]
            stamps = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
            context, rate = stream.codec_context, stream.average_rate
            bits = max(part.bits for part in context.format.components)
            film = Film(
                path, (), stream.time_base, rate or Fraction(25),
                (context.colorspace, context.color_primaries, context.color_trc),
                "444" in context.format.name or context.format.name.startswith("gbr"),
                (context.width, context.height), stream.sample_aspect_ratio or None,
            )  # fmt: skip
    except IndexError:
        raise PictureError(f"{path}: no video in this file; leave it out") from None
    except _errors() as error:
        raise PictureError(f"{path}: does not read as a video ({_reason(error)}); leave it out") from None
    if not stamps:
        raise PictureError(f"{path}: holds no frames; leave it out")
    if None in stamps or len(set(stamps)) < len(stamps):
        raise PictureError(f"{path}: frames without time stamps of their own; put it into another container first")
    if context.color_trc in HDR:
        raise PictureError(f"{path}: HDR video ({HDR[context.color_trc]}); convert it to SDR first")
    if bits > 8:
        log.warning("%s: %d bits a channel become 8", path, bits)
    return Film(**{**vars(film), "stamps": tuple(sorted(stamps))})


def frames_of(film: Film, first: int, last: int) -> Iterator[np.ndarray]:
    """RGB uint8 [H, W, 3] of frames first … last − 1, upright. PictureError where one does not decode."""
    wanted = film.stamps[first:last]
    done = 0
    for from_start in (False, True):  # where seeking lands behind a frame, or it is lost: from the beginning
        try:
            with _opened(film.path) as container:
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                if not from_start:
                    container.seek(wanted[0], stream=stream, backward=True)
                for frame in container.decode(stream):
                    if done == len(wanted) or frame.pts is None or frame.pts > wanted[done]:
                        break
                    if frame.pts == wanted[done]:
                        done += 1
                        yield _pixels(frame, _matrix(film))
        except _errors() as error:
            if from_start:
                raise PictureError(
                    f"{film.path}: {_at(film, first + done)} does not decode ({_reason(error)})"
                ) from None
        if done == len(wanted):
            return
    raise PictureError(f"{film.path}: {_at(film, first + done)} does not decode: the file is damaged there")


def write_piece(path: Path, film: Film, frames: Iterator[np.ndarray]) -> tuple[int, int]:
    """Encode frames [H, W, 3] into a file of their own, whole or not at all; their size (width, height)."""
    import av

    with replacing(path, durable=False) as temporary, av.open(str(temporary), "w", format="matroska") as out:
        stream = None
        for number, pixels in enumerate(frames):
            if stream is None:
                height, width = pixels.shape[:2]
                stream = out.add_stream("libx264", rate=film.rate, options=QUALITY)
                stream.width, stream.height = width, height
                full = film.full_chroma or width % 2 or height % 2
                stream.pix_fmt = "yuv444p" if full else "yuv420p"
                context = stream.codec_context
                context.colorspace, context.color_primaries, context.color_trc = _matrix(film), *film.colours[1:]
                context.color_range = 1  # of television
                if film.aspect:
                    turned = (width, height) != film.size
                    context.sample_aspect_ratio = 1 / film.aspect if turned else film.aspect
                context.time_base = 1 / film.rate
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame = frame.reformat(
                format=stream.pix_fmt, dst_colorspace=_matrix(film), dst_color_range=1, interpolation=EXACT
            )
            frame.pts, frame.time_base = number, 1 / film.rate
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return width, height


def try_sound(film: Film, target: Path) -> None:
    """PictureError where the target's kind of file does not hold the film's sound, which its muxer knows best: with a
    header of its own, before any frame is restored."""
    import av

    with _opened(film.path) as source:
        names = ", ".join(dict.fromkeys(stream.codec_context.name for stream in source.streams.audio))
        if not names:
            return
        try:
            with av.open(io.BytesIO(), "w", format=FORMATS[target.suffix.lower()]) as out:
                video = out.add_stream("libx264", rate=film.rate)
                video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
                for stream in source.streams.audio:
                    out.add_stream_from_template(stream)
                out.start_encoding()
        except (ValueError, *_errors()):
            raise PictureError(
                f"{film.path}: its sound ({names}) does not go into {target.suffix}: give -o NAME.mkv"
            ) from None


def join(film: Film, pieces: Sequence[Path], target: Path) -> None:
    """Write the video of the pieces' frames with the film's time stamps and sound, whole or not at all."""
    import av

    kind = FORMATS[target.suffix.lower()]
    with (
        replacing(target) as temporary,
        _opened(film.path) as source,
        av.open(str(pieces[0])) as first,
        av.open(str(temporary), "w", format=kind) as out,
    ):
        out.metadata.update(source.metadata)
        video = out.add_stream_from_template(first.streams.video[0])
        video.time_base = film.base
        sounds = {stream: out.add_stream_from_template(stream) for stream in source.streams.audio}
        for packet in _in_time(_restored_packets(film, pieces, video), _sound_packets(source, sounds)):
            out.mux(packet)


def _restored_packets(film: Film, pieces: Sequence[Path], stream: Any) -> Iterator[Any]:
    import av

    number, header = 0, None
    for piece in pieces:
        with av.open(str(piece)) as container:
            own = container.streams.video[0].codec_context.extradata
            header = own if header is None else header
            if own != header:  # pieces of two versions of the encoder
                raise PictureError(f"{piece}: was encoded otherwise than {pieces[0].name}: remove it and start again")
            for packet in container.demux(video=0):
                if not packet.size:
                    continue
                following = film.stamps[number + 1] if number + 1 < len(film.stamps) else None
                packet.stream, packet.time_base = stream, film.base
                packet.pts = packet.dts = film.stamps[number]
                packet.duration = following - film.stamps[number] if following else round(1 / film.rate / film.base)
                number += 1
                yield packet
    if number != len(film.stamps):
        raise PictureError(f"{film.path}: {number} restored frames for {len(film.stamps)}: remove {pieces[0].parent}")


def _sound_packets(source: Any, sounds: dict[Any, Any]) -> Iterator[Any]:
    for packet in source.demux(list(sounds)) if sounds else ():
        if packet.dts is not None:
            packet.stream = sounds[packet.stream]
            yield packet


def _in_time(one: Iterator[Any], other: Iterator[Any]) -> Iterator[Any]:
    """Packets of both by their time, as players want them interleaved."""
    waiting = [next(one, None), next(other, None)]
    while any(waiting):
        times = [float("inf") if packet is None else float(packet.dts * packet.time_base) for packet in waiting]
        which = times.index(min(times))
        yield waiting[which]
        waiting[which] = next((one, other)[which], None)


def _pixels(frame: Any, matrix: int) -> np.ndarray:
    pixels = frame.reformat(format="rgb24", src_colorspace=matrix, interpolation=EXACT).to_ndarray()
    return np.ascontiguousarray(np.rot90(pixels, frame.rotation // 90)) if frame.rotation else pixels


def _matrix(film: Film) -> int:
    """The code of the matrix between RGB and YCbCr: the film's own, else what its size suggests."""
    known = film.colours[0]
    if known in (BT709, BT601, 6, 7, 9):
        return known
    return BT709 if film.size[1] >= FULL_HD_FROM else BT601


def _at(film: Film, number: int) -> str:
    return f"the frame at {float(film.stamps[number] * film.base):.2f} s"


def _opened(path: Path) -> Any:
    try:
        import av
    except ImportError:
        raise PictureError(f"{path}: videos need PyAV: pip install 'sharpprior[video]'") from None
    return av.open(str(path))


def _errors() -> tuple[type[Exception], ...]:
    import av

    return (av.FFmpegError, OSError, EOFError)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
