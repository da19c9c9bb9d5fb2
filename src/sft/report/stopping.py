"""Does the model stop where its references stop? A plain verdict on the stop token."""

from sft.report.folder import Folder
from sft.report.headline import chosen_step
from sft.report.html import escaped, figure, pairs, percent
from sft.runs.metric import LEAST_LENGTH, LEAST_RECALL

SHORT, LONG = 0.6, 1.6  # length of the answers over the references'


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
    if recall is not None and recall < LEAST_RECALL:
        faults.append(
            f"The stop token is the most probable one at the end of only {percent(recall, 0)} of the references, so "
            "answers run on: look whether responses end in it in preview.html, and train longer or at a higher "
            "optimizer.lr."
        )
    if expected is not None and expected < LEAST_LENGTH:
        faults.append(
            f"Answers are expected to stop after {percent(expected, 0)} of a reference's length: look whether the "
            "responses of training are shorter than those of validation."
        )
    if stopped is not None and stopped < LEAST_RECALL:
        faults.append(f"Only {percent(stopped, 0)} of the answers ended by themselves; the others were cut.")
    if ratio is not None and not SHORT <= ratio <= LONG:
        faults.append(f"Answers are {figure(ratio, 2)} times as long as their references.")
    good = "The model stops where its references stop."
    verdict = f'<p class="verdict {"bad" if faults else "good"}">{"<br>".join(map(escaped, faults)) or good}</p>'
    items = [
        ("stop token most likely at the true end", percent(recall) if recall is not None else ""),
        ("its mean probability there", figure(prob, 3) if prob is not None else ""),
        ("probability of stopping before", figure(early, 3) if early is not None else ""),
        ("expected length over the reference's", figure(expected, 3) if expected is not None else ""),
        ("answers that stopped by themselves", percent(stopped) if stopped is not None else ""),
        ("answers' length over the references'", figure(ratio, 3) if ratio is not None else ""),
    ]
    return verdict + pairs(items)
