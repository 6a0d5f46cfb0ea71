"""What is kept of an evaluation: a line a picture, whole whenever its writer was killed."""

import json

import pytest

from train.evaluate.book import SETTINGS, Book
from train.evaluate.pairs import Item

ITEMS = [Item(f"p{n}", f"s{n % 2}", "", n, f"{n}") for n in range(7)]
IDENTITY = {"model": "a", "data": {"digest": "d", "split": "test"}, "settings": {"tile": "auto"}}


def book(folder, *, items=ITEMS, identity=IDENTITY, rank=0, world=1, overwrite=False) -> Book:
    return Book(folder, identity, items, rank=rank, world=world, overwrite=overwrite)


def test_a_stopped_evaluation_goes_on_at_the_next_picture(tmp_path):
    first = book(tmp_path)
    for item in ITEMS[:3]:
        first.add(item, {"input": {"psnr": item.number}})
    assert [item.key for item in book(tmp_path).share(1)] == ["p3", "p4", "p5", "p6"]
    assert book(tmp_path).records()["p2"]["input"] == {"psnr": 2}


@pytest.mark.parametrize("left", [2, 20, 60])
def test_a_line_that_a_kill_tore_is_done_again(tmp_path, left):
    first = book(tmp_path)
    for item in ITEMS[:3]:
        first.add(item, {"input": 1})
    first.close()
    file = tmp_path / "pictures-rank-0.jsonl"
    file.write_bytes(file.read_bytes()[:-left])
    again = book(tmp_path)
    assert [item.key for item in again.share(1)] == ["p2", "p3", "p4", "p5", "p6"]
    for item in again.share(1):
        again.add(item, {"input": 2})
    assert [record["input"] for record in book(tmp_path).records().values()] == [1, 1, 2, 2, 2, 2, 2]


def test_a_record_that_lacks_its_newline_alone_is_whole(tmp_path):
    first = book(tmp_path)
    first.add(ITEMS[0], {"input": 1})
    first.close()
    file = tmp_path / "pictures-rank-0.jsonl"
    file.write_bytes(file.read_bytes()[:-1])
    again = book(tmp_path)
    again.add(ITEMS[1], {"input": 2})
    assert [record["input"] for record in book(tmp_path).records().values()] == [1, 2]


def test_ranks_share_the_list_and_any_other_number_of_them_goes_on(tmp_path):
    for rank in range(3):
        mine = book(tmp_path, rank=rank, world=3)
        for item in mine.share(3)[:2]:
            mine.add(item, {"rank": rank})
    left = [[item.key for item in book(tmp_path, rank=rank, world=2).share(2)] for rank in range(2)]
    assert left == [["p6"], []]
    assert sorted(book(tmp_path).records()) == ["p0", "p1", "p2", "p3", "p4", "p5"]


def test_what_failed_is_tried_again_and_a_success_stays(tmp_path):
    first = book(tmp_path)
    first.add(ITEMS[0], {"failed": "torn"})
    assert ITEMS[0] in book(tmp_path).share(1)
    second = book(tmp_path)
    second.add(ITEMS[0], {"input": 1})
    second.add(ITEMS[0], {"failed": "gone"})
    assert book(tmp_path).records()["p0"]["input"] == 1
    assert ITEMS[0] not in book(tmp_path).share(1)


def test_a_file_that_was_replaced_is_measured_again(tmp_path):
    book(tmp_path).add(ITEMS[0], {"input": 1})
    changed = [ITEMS[0]._replace(stamp="other"), *ITEMS[1:]]
    assert changed[0] in book(tmp_path, items=changed).share(1)
    assert book(tmp_path, items=changed).records() == {}


def test_a_copy_of_a_measured_file_is_not_measured_again(tmp_path):
    """Another date and the same content, as of an unpacked copy; what has no known content is measured."""
    first = book(tmp_path)
    first.add(ITEMS[0], {"input": 1, "content": "c0"})
    first.add(ITEMS[1], {"input": 1})
    changed, asked = [item._replace(stamp="later") for item in ITEMS], []

    def content(item: Item) -> str:
        asked.append(item.key)
        return f"c{item.number}"

    again = Book(tmp_path, IDENTITY, changed, rank=0, world=1, overwrite=False, content=content)
    assert list(again.records()) == list(again.records()) == ["p0"]
    assert asked == ["p0"]  # a file is read once, and only where its stamp is another
    other = Book(tmp_path, IDENTITY, changed, rank=0, world=1, overwrite=False, content=lambda item: "x")
    assert other.records() == {}
    assert list(book(tmp_path).records()) == ["p0", "p1"]


def test_measurements_of_something_else_are_refused_with_the_difference(tmp_path):
    book(tmp_path).add(ITEMS[0], {"input": 1})
    other = IDENTITY | {"settings": {"tile": 64}}
    with pytest.raises(ValueError, match=r"something else \(settings\.tile auto → 64\): choose another folder"):
        book(tmp_path, identity=other)
    assert book(tmp_path, identity=other, overwrite=True).records() == {}
    assert json.loads((tmp_path / SETTINGS).read_text()) == other


def test_overwriting_forgets_the_seal_first_and_is_no_matter_for_ranks(tmp_path):
    book(tmp_path)
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="with 2 ranks: remove"):
        book(tmp_path, world=2, overwrite=True)
    book(tmp_path, overwrite=True)
    assert not (tmp_path / "results.json").exists()


def test_foreign_folders_are_left_alone(tmp_path):
    (tmp_path / "report.md").write_text("mine")
    with pytest.raises(ValueError, match=r"report\.md: exists"):
        book(tmp_path)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "pictures-rank-0.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"measurements without evaluation\.json"):
        book(tmp_path / "b")
    (tmp_path / "b" / SETTINGS).write_text("{torn")
    with pytest.raises(ValueError, match="damaged"):
        book(tmp_path / "b")
