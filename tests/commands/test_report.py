"""`vamo-ft report`: files in, one page out."""

import base64
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.report.runs import CONFIG, write_run
from vamo_ft.cli import run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PLANTED = "<script>document.title='owned'</script><img src=x onerror=\"document.title='owned'\">"


class Page(HTMLParser):
    """What a browser would see: tags with their attributes, and the text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        self.text = " ".join("".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] != "style":
            self.words.append(f"{data} ")


@pytest.fixture(autouse=True)
def _in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def page(path: str) -> Page:
    return Page(Path(path).read_text(encoding="utf-8"))


def test_one_run_gets_its_page(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("runs/a b"))
    assert run(["report", "runs/a b"]) == 0
    assert capsys.readouterr().out == "runs/a b/report.html\n"
    found = page("runs/a b/report.html")
    for words in ("a b", "finished", "some/model", "0.9000 (step 4)", "vamo-ft export 'runs/a b' 'a b-model'"):
        assert words in found.text
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(images) == 5
    assert all(attributes["alt"] for attributes in images)
    assert ("html", {"lang": "en"}) in found.tags


def test_nothing_is_asked_of_anyone() -> None:
    write_run(Path("a"))
    assert run(["report", "a"]) == 0
    found = page("a/report.html")
    addresses = [value for _, attributes in found.tags for name, value in attributes.items() if name in ("src", "href")]
    assert addresses
    assert all(address is not None and address.startswith("data:image/svg+xml;base64,") for address in addresses)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in found.tags}
    assert "url(" not in Path("a/report.html").read_text(encoding="utf-8")
    pictures = [base64.b64decode(str(address).partition(",")[2]).decode() for address in addresses]
    assert all(not re.search(r'(?:href|src)="(?!#)', picture) for picture in pictures)


def test_several_runs_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("one/a"))
    write_run(Path("two/a"), config=CONFIG.replace("probes: 4", "probes: 7") % "a")
    assert run(["report", "one/a", "two/a", "./one/a", "--png", "pictures/new"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "report.html",
        *[f"pictures/new/{name}.png" for name in ("loss", "eval_accuracy", "learning_rate", "method", "resources")],
    ]
    found = page("report.html")
    assert "Configuration: what differs key one/a two/a method.probes 4 7 Pictures" in found.text
    assert "2 runs" in found.text
    assert run(["report", "one/a", "two/a", "--out", "new/page.html"]) == 0
    assert Path("new/page.html").is_file()


def test_planted_markup_is_only_text() -> None:
    config = f"run: {{name: tiny}}\nmodel: {{path: {PLANTED!r}}}\nmethod: {{name: {PLANTED!r}}}\n"
    write_run(Path("a"), config=config, state={"state": PLANTED, "message": PLANTED})
    write_run(Path("<script>alert(1)<")), write_run(Path("b\x1b[31m"))
    assert run(["report", "a", "<script>alert(1)<", "b\x1b[31m"]) == 0
    found = page("report.html")
    assert "script" not in {tag for tag, _ in found.tags}
    assert {name for _, attributes in found.tags for name in attributes} <= {
        *("lang", "charset", "http-equiv", "content", "name", "class", "id", "scope", "tabindex", "alt", "src"),
    }
    assert PLANTED in "".join(found.words)
    assert "\x1b" not in Path("report.html").read_text(encoding="utf-8")


def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", "swordfish-swordfish")
    config = "run: {name: tiny}\ndata: {train: {path: 'https://user:hunter2pass@host/x?token=abcdefgh1234'}}\n"
    write_run(
        Path("a"), config=config, state={"state": "failed", "message": "swordfish-swordfish hf_abcdefghijklmnopqrstuv"}
    )
    assert run(["report", "a"]) == 0
    text = Path("a/report.html").read_text(encoding="utf-8")
    assert "https://***@host/x?token=***" in text
    for secret in ("hunter2pass", "abcdefgh1234", "swordfish-swordfish", "hf_abcdefghijklmnopqrstuv"):
        assert secret not in text


def test_a_run_without_metrics() -> None:
    Path("a").mkdir()
    Path("a/config.yaml").write_text(CONFIG % "a", encoding="utf-8")
    assert run(["report", "a"]) == 0
    assert "No metrics are written yet" in page("a/report.html").text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gone"], "gone: no such folder"),
        (["c/checkpoints"], "c/checkpoints: is not a run directory: it has neither config.yaml nor metrics.jsonl"),
        (["."], ".: is not a run directory; its runs are *"),
        (["x-compare"], "x-compare: is not a run directory; its runs are x-compare/runs/*"),
        (["a", "--out", "a"], "--out a: is a folder; name a file in it, such as a/report.html"),
        (["a", "--out", "a/config.yaml/x.html"], "a/config.yaml: cannot be written (File exists); name another place"),
        (["a", "--png", "a/config.yaml"], "a/config.yaml: cannot be written (File exists); name another place"),
        (["c"], "c/metrics.jsonl: cannot be read (Is a directory)"),
    ],
)
def test_what_cannot_be_done(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(Path("a"))
    write_run(Path("c"))
    write_run(Path("x-compare/runs/sgd-lr0.1-seed1"))
    Path("c/checkpoints").mkdir()
    Path("c/metrics.jsonl").unlink()
    Path("c/metrics.jsonl").mkdir()
    assert run(["report", *arguments]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_no_heavy_library_is_loaded() -> None:
    write_run(Path("a"))
    code = (
        "import sys; from vamo_ft.cli import run; assert run(['report', 'a']) == 0; "
        "print(sorted({'torch', 'transformers', 'datasets', 'accelerate', 'matplotlib.pyplot'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed here")
def test_a_real_browser_shows_the_page(tmp_path: Path) -> None:
    write_run(Path("a"), config=f"run: {{name: tiny}}\nmodel: {{path: {PLANTED!r}}}\n")
    assert run(["report", "a"]) == 0
    assert CHROMIUM is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'browser'}", "--window-size=1200,900"]
    target = (tmp_path / "a/report.html").as_uri()
    shown = subprocess.run(
        [CHROMIUM, *options, "--dump-dom", target], capture_output=True, text=True, timeout=120, check=True
    )
    assert "<title>a · vamo-ft report</title>" in shown.stdout  # the planted script would have changed it
    assert "CONSOLE" not in shown.stderr  # a refused request or a broken picture would be told there
    picture = tmp_path / "page.png"
    subprocess.run(
        [CHROMIUM, *options, f"--screenshot={picture}", target], capture_output=True, timeout=120, check=True
    )
    blank = tmp_path / "blank.png"
    subprocess.run(
        [CHROMIUM, *options, f"--screenshot={blank}", "about:blank"], capture_output=True, timeout=120, check=True
    )
    assert picture.stat().st_size > 5 * blank.stat().st_size
