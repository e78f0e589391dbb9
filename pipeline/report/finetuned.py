"""The report's part on fine-tuning."""

import pandas as pd

_SAID = (
    "<h2>Fine-tuning</h2><p>The backbones themselves trained on, from the frozen model and its best seed's head: "
    "another protocol whose scores stand in the first table, marked, and enter none of the frozen figures. The "
    "learning rate and the step are chosen on validation, the frozen start included: step 0 says that training on "
    "never helped there. Seeds differ in the order of images, not in the head's start, so their spread is narrower "
    "than that of frozen heads.</p>"
)


def finetuning_section(runs: pd.DataFrame) -> str:
    """HTML; nothing if nothing was fine-tuned.

    Args:
        runs: one row a run, of all protocols.
    """
    runs = runs[runs.protocol.str.startswith("fine-tuned")]
    if runs.empty:
        return ""
    rows = [
        {
            "dataset": dataset,
            "model": model,
            "protocol": table.protocol.iloc[0],
            "parameters trained": f"{int(table.trained_parameters.iloc[0]):,}",
            "learning rate": f"{table.learning_rate.iloc[0]:g}",
            "validation, frozen": f"{table.frozen_val_score.mean():.3f}",
            "validation, fine-tuned": f"{table.val_score.mean():.3f}",
            "best step, a seed": ", ".join(str(int(step)) for step in table.best_step),
        }
        for (dataset, model), table in runs.groupby(["dataset", "model"], sort=False)
    ]
    return _SAID + pd.DataFrame(rows).to_html(index=False)
