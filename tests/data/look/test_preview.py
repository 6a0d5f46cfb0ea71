"""Contact sheets: the right pairs, drawn at the right places, in files that open."""

import numpy as np
import pytest

from data.blur import TIERS, BlurConfig
from data.errors import DataError
from data.image import decode_image
from data.look.preview import (
    contact_sheet,
    html_page,
    kernel_picture,
    preview_pairs,
    write_contact_sheet,
    write_html_page,
)
from data.shards.set import ShardSet


@pytest.fixture
def pairs(make_set):
    return preview_pairs(ShardSet(make_set([3, 2])), BlurConfig(), count=6, crop=32, margin=8, seed=0)


def test_pairs_cover_the_tiers_from_mild_to_extreme(pairs):
    assert [TIERS.index(pair["tier"]) for pair in pairs] == [0, 0, 1, 2, 3, 4]
    assert pairs[-1]["extent"] >= 80
    assert pairs[-1]["kernel"].shape[0] > 80


def test_sheet_shows_sharp_blurry_and_kernel_of_each_pair(pairs):
    sheet = contact_sheet(pairs, side=32, columns=2)
    assert sheet.shape == (3 * (22 + 32 + 8), 2 * (96 + 8), 3)
    np.testing.assert_array_equal(sheet[22:54, :32], pairs[0]["sharp"])
    np.testing.assert_array_equal(sheet[22:54, 32:64], pairs[0]["blurry"])
    np.testing.assert_array_equal(sheet[22 + 62 : 54 + 62, 104:136], pairs[3]["sharp"])


def test_kernel_is_drawn_centred_and_whole():
    kernel = np.zeros((9, 9), np.float32)
    kernel[4, 0] = kernel[4, 8] = 0.5
    drawn = kernel_picture(kernel, 36)[..., 0]
    rows, columns = np.nonzero(drawn)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 19, 0, 35)
    large = np.zeros((101, 101), np.float32)
    large[50, 50] = 1
    assert kernel_picture(large, 40).max() > 0


def test_recorded_pairs_are_shown_without_a_kernel(make_set):
    pairs = preview_pairs(ShardSet(make_set([2], kind="pairs")), BlurConfig(), count=3, crop=32, margin=8, seed=0)
    assert [pair["kernel"] for pair in pairs] == [None] * 3
    assert contact_sheet(pairs).ndim == 3


def test_files_are_written_whole(pairs, tmp_path):
    path = write_contact_sheet(tmp_path / "new" / "sheet.png", pairs)
    np.testing.assert_array_equal(decode_image(path.read_bytes()), contact_sheet(pairs))
    page = write_html_page(tmp_path / "page.html", pairs, title="a <b>").read_text()
    assert page.count("<figure>") == 6
    assert "a &lt;b&gt;" in page
    assert "http" not in page  # nothing is loaded from elsewhere
    assert page == html_page(pairs, "a <b>")


def test_unknown_picture_format_and_zero_pairs_are_refused(pairs, tmp_path, make_set):
    with pytest.raises(DataError, match=r"\.png or \.jpg"):
        write_contact_sheet(tmp_path / "sheet.gif", pairs)
    with pytest.raises(DataError, match="at least one"):
        preview_pairs(ShardSet(make_set(name="other")), BlurConfig(), count=0, crop=32, margin=8, seed=0)
