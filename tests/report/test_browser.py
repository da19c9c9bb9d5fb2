"""The report of a real run in a browser: what a reader does with it, in both colour schemes, on a phone."""

import csv
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import whole_run
from running import Sft
from sft.report import page

SETTINGS = ("run=run", "max_steps=30", "val_every=10", "export=false")


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        reason = "there is no chromium or chromedriver here: make browser"
        (pytest.fail if "CI" in os.environ else pytest.skip)(reason)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1200,900",
    ):
        options.add_argument(argument)
    options.add_argument(f"--user-data-dir={tmp_path / 'chromium'}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    started = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield started
    started.quit()


def trained(sft: Sft) -> Path:
    """The folder of a tiny run, with the columns and answers that it lacks where nothing measures them."""
    assert sft.train(*SETTINGS) == 0
    folder = sft.run_folder()
    path = folder / "metrics.csv"
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if "train/tokens" not in rows[0]:
        for row in rows[1:]:
            row["train/tokens"] = str(900 * int(row["step"]))
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, [*rows[0], "train/tokens"], restval="")
            writer.writeheader()
            writer.writerows(rows)
    whole_run.lines(folder / "samples.jsonl", whole_run.answers(30, 10))
    page.write(folder)
    return folder


def labels(browser: Any, axis: str, what: str = "textContent") -> list[str]:
    """Those of the first chart."""
    found = f"document.querySelector('.chart').querySelectorAll('text.{axis}')"
    return [str(text) for text in browser.execute_script(f"return [...{found}].map((text) => text.{what})")]


def test_a_report_in_a_browser(sft: Sft, browser: Any) -> None:
    from selenium.webdriver import ActionChains
    from selenium.webdriver.support.select import Select

    address = (trained(sft) / "report.html").as_uri()
    browser.get_log("performance")  # of the browser's own page
    browser.get(address)

    def find(selector: str) -> Any:
        return browser.find_element("css selector", selector)

    def mouse(x: int, y: int = 0) -> ActionChains:
        return ActionChains(browser, duration=0).move_to_element_with_offset(find(".chart svg"), x, y)

    browser.execute_script("document.querySelector('.chart').scrollIntoView()")
    assert labels(browser, "x") == ["0", "5", "10", "15", "20", "25", "30"]

    # Hovering says each curve's value.
    assert not find(".chart .tip").is_displayed()
    mouse(22).perform()  # the middle of the steps
    tip = find(".chart .tip").text.splitlines()
    assert tip[:2] == ["step 15", "train/loss"]
    with Path("runs/run/metrics.csv").open(newline="") as file:
        loss = list(csv.DictReader(file))[15]["train/loss"]
    assert float(tip[2]) == pytest.approx(float(loss), rel=1e-4)

    # Dragging zooms all charts, a double click resets them.
    mouse(-100).click_and_hold().move_by_offset(200, 0).release().perform()
    zoomed = labels(browser, "x")
    assert zoomed != ["0", "5", "10", "15", "20", "25", "30"] and 10 <= float(zoomed[0]) < float(zoomed[-1]) <= 20
    assert find("#reset").is_displayed() and "zoom=" in browser.current_url
    mouse(0).double_click().perform()
    assert labels(browser, "x")[-1] == "30" and not find("#reset").is_displayed()

    height = "getAttribute('y')"
    linear = labels(browser, "y", height)
    find("#log").click()
    assert labels(browser, "y", height) != linear
    Select(find("#axis")).select_by_value("tokens")
    assert labels(browser, "x")[-1] not in ("30", "")
    find(".chart .legend button").click()
    assert len(find(".chart").find_elements("css selector", "path.curve")) == 1

    # The answers of another step.
    answer = find(".sample .tuned pre")
    after = answer.text
    script = "const s = document.getElementById('answer-step'); s.value = 0; s.dispatchEvent(new Event('input'))"
    browser.execute_script(script)
    assert find("#answer-at").text == "0" and answer.text == "the the the the the" != after

    # What was chosen outlives a refresh, as of a run that is being trained.
    browser.refresh()
    assert find("#log").is_selected() and find("#axis").get_attribute("value") == "tokens"

    grounds = []
    for scheme in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        grounds.append(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
    assert grounds == ["rgb(251, 251, 250)", "rgb(20, 22, 26)"]

    for width in (390, 1600):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(address)
        widths = "[document.documentElement.scrollWidth, document.documentElement.clientWidth, window.innerWidth]"
        whole, seen, window = browser.execute_script(f"return {widths}")
        assert whole <= seen <= window == width

    assert browser.get_log("browser") == []  # no error, and nothing that the policy has refused
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [of["params"]["request"]["url"] for of in messages if of["method"] == "Network.requestWillBeSent"]
    assert {url.partition("#")[0] for url in urls} == {address}
