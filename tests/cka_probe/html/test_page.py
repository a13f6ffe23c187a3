"""The page in headless Chromium: its numbers are the report's, by hand and by keyboard."""

from contextlib import contextmanager

import numpy as np
import pytest
from pages import LAYERS, READ, VIEWS, ends, expected, focused, luminance, made, text
from shell import furnish, words

from cka_probe.cli.main import main
from cka_probe.html import page as page_module
from cka_probe.html.page import LIMIT_BYTES, render_page, save_page
from cka_probe.report import Report
from cka_probe.summary import caveats, details, headline

HOSTILE = ["</script><b id=evil>x", '"><img src=x onerror=alert(1)>', "<!--js-->", "a&amp;b'c",
           "ein.sehr.langer.name.block12.attention.softmax.proj", "späße \\u003c ${x}"]  # fmt: skip
TIP = "() => [...document.querySelector('#tip').children].map(line => line.textContent)"
WIDTH = "() => document.documentElement.scrollWidth"


@pytest.fixture
def opened(browser, tmp_path):
    """Open a report's page; afterwards: nothing was asked of anyone, nothing went wrong."""

    @contextmanager
    def opening(report, **options):
        path = tmp_path / "report.html"
        save_page(report, path)
        context = browser.new_context(**{"viewport": {"width": 1100, "height": 900}, **options})
        tab, asked, wrong = context.new_page(), [], []
        tab.on("request", lambda request: asked.append(request.url))
        tab.on("console", lambda message: wrong.append(message.text))
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(path.as_uri())
        yield tab
        context.close()
        assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
        assert wrong == []

    return opening


def test_numbers_are_the_reports(opened):
    report = made(nan=[1])
    with opened(report) as tab:
        heads = tab.evaluate("[...document.querySelectorAll('#heatmap th')].map(t => t.dataset.n)")
        assert heads == [*VIEWS, *LAYERS]
        read = tab.evaluate(READ, "heatmap")
        assert read == expected(report, lambda what: report.against(what=what))
        for rows, columns in (("32", "96"), ("96", "32"), ("64", "32"), ("96", "96")):
            tab.select_option("#rows", label=rows)
            tab.select_option("#columns", label=columns)
            label = f"CKA of each layer of view {rows} with each of view {columns}"
            tab.locator(f"#grid[aria-label='{label}']").wait_for()
            assert tab.locator("#of-rows").text_content() == rows
            read = tab.evaluate(READ, "grid")
            assert read == expected(report, lambda w, a=rows, b=columns: report.between(a, b, w))


def test_without_javascript(opened):
    report = made(nan=[7])
    frames = [report.against(what=what) for what in ("cka", "low", "high", "stderr")]
    rows = [
        [
            layer,
            view,
            *("nan" if np.isnan(f[view][layer]) else text(f[view][layer]) for f in frames),
        ]
        for layer in LAYERS
        for view in VIEWS[:-1]
    ]
    with opened(report, java_script_enabled=False) as tab:
        cells = tab.locator("#heatmap tbody td").all_text_contents()
        wanted = expected(report, lambda what: report.against(what=what))
        assert cells == [cell[0] for row in wanted for cell in row]
        lines = tab.locator("#table tbody tr").all()
        assert [line.locator("th, td").all_text_contents() for line in lines] == rows
        assert tab.locator(".headline").inner_text() == headline(report)
        assert tab.locator(".detail").all_inner_texts() == details(report)
        assert tab.locator(".caveat").all_inner_texts() == caveats(report)
        assert not tab.locator("#filter").is_visible()
        assert len(tab.locator(".plot .line").all()) == 2


def test_pointing_at_a_cell(opened):
    report = made(nan=[3])
    low, high = (report.against(what=what) for what in ("low", "high"))
    with opened(report) as tab:
        tab.locator("#heatmap").scroll_into_view_if_needed()
        tab.wait_for_timeout(200)  # a scroll that ends late would take the tip away
        tab.locator("#heatmap tbody tr").nth(1).locator("td").nth(1).hover()
        interval = f"{text(low['64']['layer1.0'])} to {text(high['64']['layer1.0'])}"
        value = text(report.against()["64"]["layer1.0"])
        wanted = ["layer1.0 in view 64", f"CKA {value}", f"95 % interval {interval}"]
        assert tab.evaluate(TIP) == wanted
        assert tab.locator("#tip").is_visible()
        tab.locator("#heatmap tbody tr").nth(3).locator("td").nth(0).hover()
        assert tab.evaluate(TIP)[1] == "nan: constant features"
        nan, plain = (tab.locator(f"#heatmap td{kind}").first for kind in (".nan", ":not(.nan)"))
        picture = "cell => getComputedStyle(cell).backgroundImage"
        assert "gradient" in nan.evaluate(picture)
        assert plain.evaluate(picture) == "none"
        tab.mouse.move(1, 1)
        assert not tab.locator("#tip").is_visible()


def test_walking_over_cells(opened):
    report = made(nan=[3])
    value = report.against()
    with opened(report) as tab:
        for table in ("heatmap", "grid"):
            assert len(tab.locator(f"#{table} td[tabindex='0']").all()) == 1
        tab.locator("#theme").focus()
        tab.keyboard.press("Tab")
        assert focused(tab).startswith(f"stem in view 32: CKA {text(value['32']['stem'])}, 95 % ")
        assert tab.locator("#tip").is_visible()
        for key, row, column in (("ArrowDown", 1, 0), ("ArrowRight", 1, 1), ("End", 1, 2),
                                 ("ArrowRight", 1, 2), ("Home", 1, 0), ("ArrowUp", 0, 0),
                                 ("ArrowLeft", 0, 0), ("Control+End", 4, 2),
                                 ("Control+Home", 0, 0)):  # fmt: skip
            tab.keyboard.press(key)
            assert focused(tab, "walk") == [row, column], key
            assert focused(tab).startswith(f"{LAYERS[row]} in view {VIEWS[column]}: CKA ")
            assert tab.evaluate(TIP)[0] == f"{LAYERS[row]} in view {VIEWS[column]}"
        for _ in range(3):
            tab.keyboard.press("ArrowDown")
        assert focused(tab).startswith("layer2.0 in view 32: nan: constant features")
        tab.keyboard.press("Escape")
        assert not tab.locator("#tip").is_visible()


def test_curve(opened):
    report = made(nan=[3])
    value = report.against()
    with opened(report) as tab:
        plot = tab.locator(".plot")
        plot.scroll_into_view_if_needed()
        box = plot.bounding_box()
        dot = tab.locator("g[data-s='1'] .dot[data-k='2']").bounding_box()
        dot = {"x": dot["x"] + dot["width"] / 2, "y": dot["y"] + dot["height"] / 2}
        assert dot["x"] - box["x"] == pytest.approx(box["width"] / 2, abs=1)
        one, zero = (
            tab.locator(f".plot .y:text-is('{tick}')").bounding_box() for tick in ("1", "0")
        )
        share = (dot["y"] - zero["y"] - zero["height"] / 2) / (one["y"] - zero["y"])
        assert share == pytest.approx(value["64"]["layer1.1"], abs=0.01)
        tab.mouse.move(dot["x"] + 4, dot["y"] + 1)
        assert tab.evaluate(TIP)[:2] == [
            "layer1.1 in view 64", f"CKA {text(value['64']['layer1.1'])}"
        ]  # fmt: skip
        tab.locator("g[data-s='0'] .dot[data-k='2']").focus()
        tab.keyboard.press("ArrowRight")
        assert focused(tab).startswith("head in view 32: CKA")  # over the gap of a nan
        tab.keyboard.press("ArrowDown")
        assert focused(tab).startswith("head in view 64: CKA")
        gap = tab.locator("g[data-s='0'] .line").get_attribute("d")
        assert gap.count("M") == 2
        button = tab.locator(".legend button").first
        assert button.inner_text() == "32"
        button.click()
        assert button.get_attribute("aria-pressed") == "false"
        assert not tab.locator("g[data-s='0'] .line").is_visible()
        tab.locator("g[data-s='1'] .dot[data-k='0']").focus()
        tab.keyboard.press("ArrowUp")
        assert focused(tab).startswith("stem in view 64")  # nothing to walk to
        button.press("Enter")
        assert tab.locator("g[data-s='0'] .line").evaluate("e => getComputedStyle(e).display")
        assert button.get_attribute("aria-pressed") == "true"


def test_sorting_and_filtering(opened):
    report = made(nan=[1])
    column = "[...document.querySelectorAll('#table tbody tr')].map(r => r.cells[{}].textContent)"
    with opened(report) as tab:
        heads = tab.locator("#table thead th")
        layers = tab.evaluate(column.format(0))
        heads.nth(2).locator("button").press("Enter")
        assert heads.nth(2).get_attribute("aria-sort") == "ascending"
        values = [float(value) for value in tab.evaluate(column.format(2))]
        assert values[:-1] == sorted(values[:-1])
        assert np.isnan(values[-1])
        heads.nth(2).locator("button").click()
        assert heads.nth(2).get_attribute("aria-sort") == "descending"
        values = [float(value) for value in tab.evaluate(column.format(2))]
        assert values[:-1] == sorted(values[:-1], reverse=True)
        assert np.isnan(values[-1])
        heads.nth(0).locator("button").click()
        assert tab.evaluate(column.format(0)) == layers  # execution order, not the alphabet's
        assert heads.nth(2).get_attribute("aria-sort") is None
        tab.fill("#filter", "LAYER1 64")
        seen = tab.locator("#table tbody tr:visible th").all_text_contents()
        assert seen == ["layer1.0", "layer1.1"]
        assert tab.locator("#count").inner_text() == "2 of 10 rows"
        tab.emulate_media(media="print")
        assert len(tab.locator("#table tbody tr:visible").all()) == 10


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(opened, scheme):
    colours = """selector => [...document.querySelectorAll(selector)].map(element => {
      const parse = (text) => text.match(/[\\d.]+/g).map(Number);
      let ground = element;
      const clear = (e) => (parse(getComputedStyle(e).backgroundColor)[3] ?? 1) === 0;
      while (clear(ground) && ground.parentElement) ground = ground.parentElement;
      return [getComputedStyle(element).color, getComputedStyle(ground).backgroundColor].map(parse);
    })"""
    texts = "h1, .sub, .headline, .detail, .caveat, .note, "
    texts += "#heatmap th, #heatmap td:not(.nan), .plot .x, dt, dd"
    with opened(made(), color_scheme=scheme) as tab:
        for turn in range(2):
            pairs = tab.evaluate(colours, f"{texts}, .legend button, #table td, #theme, select")
            assert len(pairs) > 60
            for pair in pairs:
                dark, bright = sorted(luminance(colour) for colour in pair)
                assert (bright + 0.05) / (dark + 0.05) >= 4.5, pair
            paper = luminance(tab.evaluate(colours, "body")[0][1])
            assert (paper < 0.1) == ((scheme == "dark") != bool(turn))
            tab.click("#theme")
        tab.emulate_media(media="print", color_scheme=scheme)
        assert tab.evaluate(colours, "body")[0] == [[0, 0, 0], [255, 255, 255]]
        assert not tab.locator("#theme, #rows, #filter").first.is_visible()


@pytest.mark.parametrize(
    "names", [(LAYERS, VIEWS), (HOSTILE, [*HOSTILE[:3], "b" * 60]),
              ([f"layer{k // 9}.{k % 9}.conv2" for k in range(60)], ["8", "16", "24", "32"])],
)  # fmt: skip
def test_telephone(opened, names):
    with opened(made(*names), viewport={"width": 375, "height": 700}) as tab:
        tab.locator("#grid td").first.wait_for(state="attached")
        assert tab.evaluate(WIDTH) == 375
        tab.locator("#heatmap tbody tr td").last.focus()
        assert tab.locator("#tip").bounding_box()["x"] >= 0
        assert tab.evaluate(WIDTH) == 375


def test_hostile_names(opened):
    views = ["<i>32", "</style><script>x", HOSTILE[1]]
    report = made(HOSTILE, views, left_out=["<b>\udce9.jpg"], model={"name": "<u>net</u>"})
    with opened(report) as tab:
        tab.select_option("#rows", "1")
        tab.locator("#grid[aria-label*='view </style>']").wait_for()
        assert len(tab.locator("#evil, main b:not(.note b), i:not(.bar), u, img").all()) == 0
        assert len(tab.locator("script").all()) == 3
        names = "[...document.querySelectorAll('#{} tbody th')].map(t => t.dataset.n)"
        assert tab.evaluate(names.format("heatmap")) == HOSTILE
        assert tab.evaluate(names.format("grid")) == HOSTILE
        tab.locator("#heatmap td").nth(1).hover()
        assert tab.evaluate(TIP)[0] == f"{HOSTILE[0]} in view <i>32"
        assert tab.locator("h1").inner_text() == "<u>net</u>"


def test_policy_forbids_the_network(opened):
    blocked = """() => new Promise(done => {
      document.addEventListener("securitypolicyviolation", e => done(e.violatedDirective));
      document.body.append(Object.assign(new Image(), { src: "http://127.0.0.1:9/x.png" }));
    })"""
    policy = (
        "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    )
    assert policy in render_page(made())
    with pytest.raises(AssertionError, match=r"x\.png"), opened(made()) as tab:
        assert tab.evaluate(blocked) == "img-src"


def test_large_report(opened, tmp_path):
    layers = [f"features.denseblock3.denselayer{k}.conv2" for k in range(100)]
    report = made(layers, [str(32 + k) for k in range(8)], spread=0.1)  # nothing to compress
    with opened(report) as tab:
        file = tmp_path / "report.html"
        assert file.stat().st_size < LIMIT_BYTES
        assert '"kept":"all"' in file.read_text(encoding="utf-8")
        tab.locator("#grid tbody td").first.wait_for(state="attached")
        cka, low, high = (report.between("32", "39", what) for what in ("cka", "low", "high"))
        for row, column in ((97, 31), (0, 99), (99, 0), (99, 99)):
            cell = tab.evaluate(f"""[document.querySelectorAll("#grid tbody tr")[{row}]
              .cells[{column + 1}]].map(c => [c.textContent, c.dataset.c, c.dataset.i])[0]""")
            at = (layers[row], layers[column])
            assert cell == ["", text(cka.loc[at]), ends(low.loc[at], high.loc[at])]


def test_too_large_a_report(opened, monkeypatch):
    report = made()
    monkeypatch.setattr(page_module, "_MOST_PAIRS", 100)  # of 120, and 75 with the reference
    with opened(report) as tab:
        assert "report.npz and cka.csv hold all" in tab.locator("#pairwise .note").inner_text()
        assert tab.locator("#columns option").all_text_contents() == ["96"]
        tab.select_option("#rows", label="64")
        tab.locator("#grid[aria-label*='of view 64']").wait_for()
        wanted = expected(report, lambda what: report.between("64", "96", what))
        assert tab.evaluate(READ, "grid") == wanted
    monkeypatch.setattr(page_module, "LIMIT_BYTES", 0)
    with opened(report) as tab:
        assert "cka.csv hold them" in tab.locator("#pairwise").inner_text()
        assert len(tab.locator("#pairwise td").all()) == 0


def test_two_networks(opened):
    whole = made(["x"], [str(k) for k in range(7)], groups=None)
    view, layer = ["a"] * 3 + ["b"] * 4, [*"uvw", *"pqrs"]
    report = Report(whole.cka, whole.stderr, view, layer, {"reference": "a"})
    with opened(report) as tab:
        assert len(tab.locator("#heat, #curves").all()) == 0
        wanted = expected(report, lambda what: report.between("a", "b", what))
        assert tab.evaluate(READ, "grid") == wanted
        table = report.between("a", "b")
        rows = [[name, "b", table[name].idxmax(), text(table[name].max())] for name in "pqrs"]
        lines = tab.locator("#table tbody tr").all()
        assert [line.locator("th, td").all_text_contents()[:4] for line in lines] == rows
        tab.locator("#grid tbody td").first.hover()
        assert tab.evaluate(TIP)[2] == "no interval"


def test_the_page_of_a_real_run_equals_its_report(browser, tmp_path):
    out = tmp_path / "o"
    assert main(words(furnish(tmp_path), out, "--quiet", "--layers", "*")) == 0
    report = Report.load(out / "report.npz")
    tab = browser.new_page()
    tab.goto((out / "report.html").as_uri())
    wanted = expected(report, lambda what: report.against(what=what))
    assert tab.evaluate(READ, "heatmap") == wanted
    assert tab.locator(".headline").inner_text() == headline(report)
    for part in (".headline", ".detail", ".caveat"):  # side by side, not squeezed
        assert tab.locator(part).first.bounding_box()["width"] > 250
    for rows, columns in (("8", "16"), ("16", "16"), ("8", "8")):
        tab.select_option("#rows", label=rows)
        tab.select_option("#columns", label=columns)
        label = f"CKA of each layer of view {rows} with each of view {columns}"
        tab.locator(f"#grid[aria-label='{label}']").wait_for()
        read = tab.evaluate(READ, "grid")
        assert read == expected(report, lambda w, a=rows, b=columns: report.between(a, b, w))
    assert f"sha256 {report.meta['run']['images']['sha256'][:12]}" in tab.content()
    tab.close()


def test_saved_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    save_page(made(), path)
    before = path.read_bytes()
    assert before.decode().startswith("<!doctype html>")
    monkeypatch.setattr(page_module, "render_page", lambda report: "\ud800")
    with pytest.raises(UnicodeEncodeError):
        save_page(made(), path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(OSError, match="absent"):
        save_page(made(), tmp_path / "absent" / "report.html")
