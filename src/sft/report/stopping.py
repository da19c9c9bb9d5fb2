"""Does the model stop where its references stop? A plain verdict on the stop token."""

from sft.report.folder import Folder
from sft.report.headline import chosen_step
from sft.report.html import escaped, figure, pairs, percent

RECALL = 0.5  # of the ends, below which a model runs on
EARLY = 0.5  # probability of having stopped before the end, above which answers are too short
SHORT, LONG = 0.7, 1.5  # length over the reference's


def stopping(folder: Folder) -> str:
    step = chosen_step(folder)
    recall, prob, early, stopped, ratio = (
        folder.last(name, step)
        for name in ("val/stop_recall", "val/stop_prob", "val/stop_early", "answers/stopped", "answers/length_ratio")
    )
    expected = folder.last("val/expected_length", step)
    if all(value is None for value in (recall, prob, early, stopped, ratio, expected)):
        return ""
    faults = []
    if recall is not None and recall < RECALL:
        faults.append(
            f"At only {percent(recall)} of the references' ends the stop token is the most likely one: answers run on. "
            "Train longer, and check that the stop token is supervised (sft preview)."
        )
    if early is not None and early > EARLY:
        faults.append(
            f"With probability {figure(early, 2)} it would stop before the reference ends: answers are too short."
        )
    if stopped is not None and stopped < RECALL:
        faults.append(f"Only {percent(stopped)} of the answers ended by themselves; the others were cut.")
    if ratio is not None and ratio < SHORT:
        faults.append(f"Answers are {figure(ratio, 2)} times as long as the references.")
    if ratio is not None and ratio > LONG:
        faults.append(f"Answers are {figure(ratio, 2)} times as long as the references.")
    good = "The model stops where its references stop."
    verdict = f'<p class="verdict {"bad" if faults else "good"}">{"<br>".join(map(escaped, faults)) or good}</p>'
    items = [
        ("stop token most likely at the true end", percent(recall) if recall is not None else ""),
        ("its mean probability there", figure(prob, 3) if prob is not None else ""),
        ("probability of stopping before", figure(early, 3) if early is not None else ""),
        ("expected length", figure(expected, 3) if expected is not None else ""),
        ("answers that stopped by themselves", percent(stopped) if stopped is not None else ""),
        ("length over the reference's", figure(ratio, 3) if ratio is not None else ""),
    ]
    return verdict + pairs(items)
