"""Run folders for the tests of reporting, written as the runs layer writes them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

CLASSES = ("left ventricle", "myocardium", "right ventricle")


def finetune_run(
    folder: Path, *, arms=("scratch", "gcl"), counts=(1, 2, 4), draws=3, cases=12, effect=0.06, name="case"
):
    """A fine-tuning run whose second and later arms are better by about ``effect``."""
    rng = np.random.default_rng(7)
    rows, cells, table, paired = [], [], [], []
    hardness = rng.normal(0, 0.05, (cases, len(CLASSES)))
    for n in counts:
        scores = {}
        for a, arm in enumerate(arms):
            for draw in range(draws):
                base = 0.88 - 0.28 / n**0.8 + effect * a / n**0.5 + rng.normal(0, 0.03)
                cells.append(_cell(folder, rng, arm, n, draw, base))
                for case in range(cases):
                    for k, label in enumerate(CLASSES):
                        dice = float(np.clip(base - 0.07 * k + hardness[case, k] + rng.normal(0, 0.02), 0, 0.97))
                        rows.append(
                            {
                                "arm": arm, "n_labelled": n, "draw": draw, "seed": 0, "case": f"{name}{case:02d}",
                                "subject": f"{name}{case:02d}", "group": f"{name}{case:02d}",
                                "class": label, "dice": dice,
                                "hd95_mm": 20 * (1 - dice), "missed": 0, "voxels_label": 900, "voxels_prediction": 880,
                            }
                        )  # fmt: skip
            frame = pd.DataFrame([row for row in rows if row["arm"] == arm and row["n_labelled"] == n])
            per_draw = frame.groupby("draw")["dice"].mean()
            scores[arm] = per_draw
            table.append(
                {
                    "arm": arm, "n_labelled": n, "n_validation": max(1, n // 2), "n_draws": draws, "n_seeds": 1,
                    "mean": float(per_draw.mean()), "sd": float(per_draw.std()) if draws > 1 else None,
                    "min": float(per_draw.min()), "max": float(per_draw.max()),
                    "hd95_mm": float(frame["hd95_mm"].mean()), "missed": 3,
                }
            )  # fmt: skip
        for arm in arms[1:]:
            difference = scores[arm] - scores[arms[0]]
            half = 2 * float(difference.std() if draws > 1 else 0.04) / max(draws, 1) ** 0.5 + 0.01
            middle = float(difference.mean())
            paired.append(
                {
                    "arm": arm, "baseline": arms[0], "n_labelled": n, "difference": middle,
                    "low": middle - half, "high": middle + half, "n_people": cases, "n_draws": draws,
                }
            )  # fmt: skip
    summary = {
        "task": "segmentation", "metric": "dice", "table": table, "paired": paired,
        "upper_bound": {"mean": 0.87, "n_labelled": 40},
        "gap_closed": [{"arm": arms[-1], "n_labelled": n, "share": 0.3} for n in counts],
        "left_out": {"both_empty": 4}, "transductive": False, "leak_check": {"groups_shared": 0, "volumes_shared": 0},
        "notes": ["Checkpoints were chosen on the validation labels."],
    }  # fmt: skip
    _text(folder / "eval/summary.json", json.dumps(summary))
    pd.DataFrame(rows).to_csv(folder / "eval/per_case.csv", index=False)
    pd.DataFrame(cells).to_csv(folder / "eval/cells.csv", index=False)
    _overlays(folder, rng, name)
    common(folder, "finetune")
    return summary


def _cell(folder, rng, arm, n, draw, base):
    steps = np.arange(0, 400, 5)
    loss = 1.1 * np.exp(-steps / (90 + 20 * draw)) + 0.1 + rng.normal(0, 0.03, len(steps))
    metrics = pd.DataFrame({"step": steps, "loss": loss, "lr": 1e-3, "seconds": steps * 0.05})
    metrics["val_dice"] = np.where(steps % 50 == 0, base * (1 - np.exp(-(steps + 20) / 80)), np.nan)
    path = folder / f"cells/{arm}-n{n}-draw{draw}-seed0/logs/metrics.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics.to_csv(path, index=False)
    return {
        "arm": arm, "n_labelled": n, "draw": draw, "seed": 0, "n_validation": max(1, n // 2), "best_step": 350,
        "best_score": base, "steps": 400, "seconds": 31.5, "status": "done",
    }  # fmt: skip


def _overlays(folder, rng, name):
    x, y = np.meshgrid(np.arange(96), np.arange(80), indexing="ij")
    distance = np.hypot(x - 50, y - 40)
    label = np.where(distance < 12, 1, np.where(distance < 19, 2, 0)) + 3 * (np.hypot(x - 28, y - 42) < 9)
    for rank, shift in (("best", 0), ("median", 3), ("worst", 8)):
        image = rng.normal(60, 9, label.shape) + 90 * (label == 1) + 50 * (label == 3) + 25 * (label == 2)
        path = folder / f"eval/overlays/{rank}.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        title = f"{rank}: {name}03, slice 5, Dice {0.93 - shift / 20:.2f}"
        np.savez(path, image=image.astype("f4"), label=label, prediction=np.roll(label, shift, 0), title=title)


def pretrain_run(folder: Path, *, collapse=()):
    """A pretraining run with monitors."""
    rng = np.random.default_rng(3)
    steps = np.arange(1, 1001)
    pd.DataFrame(
        {
            "step": steps, "loss": 4 * np.exp(-steps / 200) + 1 + rng.normal(0, 0.1, len(steps)),
            "learning_rate": 1e-3 * (1 - steps / 1001), "spread": 0.9 - 0.3 * np.exp(-steps / 100),
            "effective_rank": 30 + 5 * np.sin(steps / 90), "positive_similarity": 1 - np.exp(-steps / 300),
        }
    ).to_csv(_parent(folder / "logs/metrics.csv"), index=False)  # fmt: skip
    content = {
        "method": "gcl", "steps": 1000, "seconds": 812.0, "data_wait_share": 0.04, "collapse": list(collapse),
        "weights": {"encoder": 62, "decoder": 24},
    }  # fmt: skip
    _text(folder / "eval/pretrain.json", json.dumps(content))
    common(folder, "pretrain")


def common(folder: Path, kind: str):
    """The files of every run."""
    config = {
        "name": folder.name,
        "data": {"manifest": "/home/someone/data/acdc/manifest.csv", "cache": "~/cache/x"},
        "seed": 1,
    }
    _text(folder / "config.yaml", yaml.safe_dump(config, sort_keys=False))
    environment = {
        "medssl": "0.1.0",
        "python": "3.11.4",
        "device": "cpu",
        "threads": 2,
        "versions": {"torch": "2.13.0"},
    }
    _text(folder / "environment.json", json.dumps(environment))
    status = {"kind": kind, "state": "done", "started": "2026-01-02T03:04:05+00:00", "seconds": 1830.0}
    _text(folder / "status.json", json.dumps(status))
    rows = [
        {
            "subject": f"p{i:02d}", "image": f"/data/p{i:02d}.nii.gz",
            "label": f"/data/p{i:02d}_gt.nii.gz" if i % 3 else None, "site": f"s{i % 3}",
            "age": 40 + i if i != 5 else None, "sex": "FM"[i % 2], "split": ("train", "test")[i > 14],
            "group": f"p{i:02d}",
        }
        for i in range(24)
    ]  # fmt: skip
    pd.DataFrame(rows).to_csv(folder / "manifest.csv", index=False)
    meta = {
        "name": "small hearts",
        "licence": "CC BY-SA 4.0",
        "citation": "A. Author, 2020",
        "label_names": {1: "left ventricle"},
    }
    _text(folder / "manifest.meta.yaml", yaml.safe_dump(meta))


def _parent(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _text(path: Path, text: str):
    _parent(path).write_text(text)
