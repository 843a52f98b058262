"""report.html in a real browser: headless Chromium opens it from disk without a network."""

import json
import re

import pytest

import train
from src.report.__main__ import main
from src.report.page import renew_report
from tests.conftest import ROOT
from tests.tools.chromium import find_chromium
from tests.tools.synthetic_run import write_run

sync_api = pytest.importorskip(
    "playwright.sync_api", reason="playwright is not installed (requirements-dev.txt)"
)
pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium found; apt-get install chromium, or set CHROMIUM"
)

HOSTILE = (
    "</script><script>hacked = 1</script></textarea>\x1b[31mred\x1b[0m \u202ereversed\u202c "
    "<img src=x onerror=hacked=1>"
)


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a file without a network; afterwards checks that it requested nothing and logged nothing."""
    contexts, requests, messages = [], [], []

    def open_page(file, **settings):
        context = browser.new_context(**dict(offline=True, viewport=dict(width=1400, height=900)) | settings)
        contexts.append(context)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: messages.append(message.text))
        page.on("pageerror", lambda error: messages.append(str(error)))
        page.goto(file.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert messages == []
    assert all(url.startswith("file://") for url in requests) and len(requests) == len(contexts)


@pytest.fixture(scope="module", params=["tiny", pytest.param("embedded", marks=pytest.mark.slow)])
def trained(request, tmp_path_factory, policy_folder, reward_model_folder):
    """The folder of a real run of 20 steps with a reward model.

    Its models are tiny and random, or the bundled ones, which takes two minutes.
    """
    if request.param == "tiny":
        models = dict(
            model_name=str(policy_folder), reward_model_name=str(reward_model_folder), max_length=160
        )
    else:
        models = dict(model_name="embedded")
    problems = str(ROOT / "data/dummy_math_tasks.jsonl")
    return train.main(
        **models, device="cpu", data=problems, rollouts_per_step=2, group_size=4, train_batch_size=8,
        max_new_tokens=12, max_steps=20, eval_data=problems, eval_interval=10, checkpoint_interval=20,
        output=str(tmp_path_factory.mktemp("runs")), run_name="run",
    )  # fmt: skip


def count(page) -> int:
    """The number of completions listed, as the page says it."""
    return int(page.locator("#count").inner_text().split()[0].replace(",", ""))


def test_the_report_of_a_complete_run_has_every_section_and_its_filters_work(trained, open_page):
    page = open_page(trained / "report.html")
    assert page.locator("p.result").inner_text().startswith("Held-out accuracy")
    titles = [h.inner_text() for h in page.locator("main h2").all()]
    for title in (
        "Does it learn?", "Is the reward model any good?", "Is there anything to learn from?",
        "Is the policy healthy?", "Where does the time go?", "All other metrics", "The completions",
        "Settings",
    ):  # fmt: skip
        assert title in titles
    for figure in page.locator("section:not(:has(details > summary > h2)) figure").all():
        assert figure.locator("figcaption").inner_text().strip()
        assert figure.locator("svg").bounding_box()["height"] > 100

    rows = [json.loads(line) for line in (trained / "rollouts.jsonl").open(encoding="utf-8")]
    assert count(page) == len(rows) == 160
    page.select_option("#step", "7")
    assert count(page) == 8
    page.select_option("#question", index=2)
    assert count(page) == 4
    page.click("button.reset")
    sync_api.expect(page.locator("#count")).to_contain_text("160 of 160")
    page.click("[data-chip=truncated]")
    assert count(page) == sum(not row["finished"] for row in rows)
    page.click("[data-chip=truncated]")
    page.fill("#search", rows[37]["question"].upper())
    assert count(page) == sum(row["question"] == rows[37]["question"] for row in rows) < 160
    page.fill("#search", "no completion says this")
    assert count(page) == 0 and page.locator("#list .row").count() == 0


def test_filters_orders_and_search_list_what_they_promise(tmp_path, open_page):
    run = write_run(tmp_path / "run", steps=12, questions=3, group_size=4)
    renew_report(run)
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").open(encoding="utf-8")]
    page = open_page(run / "report.html")
    assert count(page) == 144
    page.select_option("#verdict", "0")
    assert count(page) == sum(not row["correct"] for row in rows)
    page.select_option("#verdict", "")

    def median(verdict):
        scores = sorted(row["rm_score"] for row in rows if row["correct"] is verdict)
        return scores[len(scores) // 2]

    halfway = (median(True) + median(False)) / 2
    fooled = sorted(
        (r["rm_score"] for r in rows if not r["correct"] and r["rm_score"] > halfway), reverse=True
    )
    page.click("[data-chip=fooled]")
    assert count(page) == len(fooled) > 2
    shown = [
        float(row.locator("> span").nth(4).inner_text().rstrip("*"))
        for row in page.locator("#list .row").all()
    ]
    assert shown == pytest.approx(fooled[: len(shown)], abs=0.051)
    page.click("[data-chip=missed]")  # releases the other one
    assert count(page) == sum(r["correct"] and r["rm_score"] < halfway for r in rows) > 0
    page.click("[data-chip=strong]")
    largest = sorted((abs(r["advantage"]) for r in rows), reverse=True)
    assert count(page) == sum(a >= largest[14] for a in largest)
    page.click("[data-chip=strong]")
    page.select_option("#order", "-reward")
    lowest = min(rows, key=lambda row: row["reward"])
    assert page.locator("#list .row").first.locator("> span").nth(7).inner_text() == f"{lowest['reward']:.2f}"
    assert lowest["completion"] in page.locator("#detail").inner_text()
    page.select_option("#order", "")
    words = rows[50]["completion"][:24].strip()
    page.fill("#search", words)
    assert count(page) == sum(words in row["completion"] for row in rows)
    assert page.locator("#detail mark").first.inner_text() == words


def test_the_explanation_of_a_reward_adds_up(tmp_path, open_page):
    run = write_run(tmp_path / "run", steps=2)
    renew_report(run)
    row = json.loads((run / "rollouts.jsonl").read_text().split("\n")[1])
    page = open_page(run / "report.html")
    page.locator("#list .row").nth(1).click()
    words = " ".join(page.locator("#detail .reasons").inner_text().split())
    band = ("0.50", "1.50") if row["correct"] else ("-0.50", "0.50")
    assert f"places r_hat in the band from {band[0]} to {band[1]}" in words
    assert f"The RM score {row['rm_score']:.2f}" in words and f"{100 * row['n']:.0f}% of the way" in words
    assert f"r_hat is {row['r_hat']:.2f}" in words and f"×{row['weight']:.2f}" in words
    assert f"the reward is {row['reward']:+.2f}" in words
    assert f"the advantage is {row['advantage']:+.2f}" in words
    assert page.locator("#detail .group tbody tr").count() == 4


def test_a_click_in_the_group_shows_that_completion_even_if_a_filter_hides_it(tmp_path, open_page):
    run = write_run(tmp_path / "run", steps=6)
    renew_report(run)
    page = open_page(run / "report.html")
    page.click("[data-chip=fooled]")
    page.select_option("#step", "5")
    right = page.locator(
        "#detail .group tr", has=page.locator(".is-right")
    ).first  # hidden, as it is not wrong
    words = right.inner_text()
    right.click()
    sync_api.expect(page.locator("#detail .group tr.here")).to_have_text(words, use_inner_text=True)
    assert count(page) == 72
    page.wait_for_timeout(100)  # no later refresh may select another row
    assert page.locator("#detail .group tr.here").inner_text() == words


def test_the_keyboard_reaches_everything(tmp_path, open_page):
    run = write_run(tmp_path / "run", steps=4, questions=3, group_size=4)
    renew_report(run)
    page = open_page(run / "report.html")

    def place():
        return int(page.locator("[aria-selected=true]").get_attribute("aria-posinset"))

    page.focus("#list")
    for key, expected in (
        ("ArrowDown", 2),
        ("j", 3),
        ("k", 2),
        ("End", 48),
        ("ArrowDown", 48),
        ("Home", 1),
        ("PageDown", 15),
    ):
        page.keyboard.press(key)
        if key != "PageDown":
            assert place() == expected, key
    assert 5 < place() < 40
    assert page.locator("#list").get_attribute("aria-activedescendant") == f"row-{place() - 1}"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "detail"
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "list"
    page.keyboard.press("]")
    assert page.locator("#step").input_value() == "0" and count(page) == 12
    page.keyboard.press("/")
    page.keyboard.type("What")
    assert page.locator("#search").input_value() == "What"


def test_a_hostile_completion_stays_text(tmp_path, open_page):
    run = write_run(tmp_path / "run", steps=1, questions=1, group_size=2)
    rows = [json.loads(line) for line in (run / "rollouts.jsonl").open(encoding="utf-8")]
    rows[0] |= dict(completion=HOSTILE, question=HOSTILE, answer=HOSTILE, parsed_answer=HOSTILE)
    (run / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    renew_report(run)
    page = open_page(run / "report.html")
    page.locator("#list .row").first.click()
    completion = page.locator("#detail .completion")
    assert completion.inner_text() == (
        "</script><script>hacked = 1</script></textarea>␛[31mred␛[0m U+202EreversedU+202C "
        "<img src=x onerror=hacked=1>"
    )
    stand_ins = completion.locator(".stand-in").all()
    assert [element.inner_text() for element in stand_ins] == ["␛", "␛", "U+202E", "U+202C"]
    assert not re.search("[\u202a-\u202e\x1b]", page.locator("body").inner_text())
    assert page.evaluate("window.hacked") is None
    assert page.locator("img, textarea").count() == 0 and page.locator("script").count() == 2
    page.fill("#search", "</TEXTAREA>")
    assert count(page) == 1 and page.locator("#detail mark").count() == 2


def test_only_the_rows_in_sight_of_20_000_completions_are_drawn(tmp_path, open_page):
    run = write_run(tmp_path / "run", steps=500, questions=5, group_size=8)
    renew_report(run)
    page = open_page(run / "report.html")
    assert count(page) == 20_000
    assert 10 < page.locator("#list .row").count() < 40
    page.focus("#list")
    page.keyboard.press("End")
    assert page.locator("[aria-selected=true]").get_attribute("aria-posinset") == "20000"
    assert page.locator("#list .row").count() < 40
    page.select_option("#step", "250")
    assert count(page) == 40


def test_the_page_works_in_dark_in_light_and_on_a_phone(tmp_path, open_page):
    run = write_run(tmp_path / "run")
    renew_report(run)

    def brightness(page, selector, css_property):
        color = page.locator(selector).first.evaluate(f"e => getComputedStyle(e).{css_property}")
        return sum(map(int, re.findall(r"\d+", color)[:3]))

    for scheme in ("light", "dark"):
        page = open_page(run / "report.html", color_scheme=scheme)
        paper, ink = brightness(page, "body", "backgroundColor"), brightness(page, "figure svg text", "fill")
        assert (paper > 700 > 200 > ink) if scheme == "light" else (paper < 200 < 600 < ink)
    page.click("#theme")  # from auto to light
    assert brightness(page, "body", "backgroundColor") > 700

    page = open_page(
        run / "report.html", viewport=dict(width=390, height=844), has_touch=True, is_mobile=True
    )
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.locator("#detail").is_hidden()
    page.locator("#list .row").nth(2).click()
    assert page.locator("#detail").bounding_box()["width"] == 390
    page.click("#detail .close")
    assert page.locator("#detail").is_hidden()


def test_a_click_on_a_curve_lists_that_step_and_runs_can_be_chosen(tmp_path, open_page):
    folders = [write_run(tmp_path / name, steps=5) for name in ("a", "b")]
    page = open_page(main(folders))
    plot = page.locator("figure", has_text="Right answers during training").locator(".plot")
    plot.hover(position=dict(x=plot.bounding_box()["width"] - 8, y=40))
    assert "a all completions 74.0%" in page.locator("figure .values", has_text="step 4").inner_text()
    plot.click(position=dict(x=plot.bounding_box()["width"] - 8, y=40))
    assert page.locator("#step").input_value() == "4" and count(page) == 24
    page.select_option("#run", "1")
    assert count(page) == 12


def test_runs_that_were_interrupted_or_have_no_reward_model_can_be_browsed(tmp_path, open_page):
    run = write_run(tmp_path / "run", scores=False, evaluate=False, total_steps=9)
    with (run / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 6, "ques')
    renew_report(run)
    page = open_page(run / "report.html")
    assert "still running, or had been interrupted" in page.locator("header").inner_text()
    assert page.locator("[data-chip=fooled]").is_disabled() and count(page) == 72
    assert "There is no reward model" in page.locator("#detail").inner_text()
    empty = write_run(tmp_path / "empty")
    (empty / "rollouts.jsonl").unlink()
    (empty / "metrics.jsonl").unlink()
    renew_report(empty)
    page = open_page(empty / "report.html")
    assert "No completions have been written yet." in page.locator("#count").inner_text()
