"""A wheel of the package, installed away from the repository, trains, learns and predicts on what it ships."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
LACKING = [name for name in ("hatchling", "pip") if importlib.util.find_spec(name) is None]
FEW = ("--max_train_samples_per_class", "4", "--max_eval_samples_per_class", "2", "--num_train_epochs", "1")


def photos(folder: Path) -> Path:
    """Drawings of a cross and a ring, ten of each."""
    for i in range(10):
        for name in ("cross", "ring"):
            image, box = Image.new("L", (32, 32)), (4 + i % 3, 4, 27, 25 + i % 2)
            draw = ImageDraw.Draw(image)
            if name == "ring":
                draw.ellipse(box, outline=255, width=3)
            else:
                draw.line(box, fill=255, width=3)
                draw.line((box[0], box[3], box[2], box[1]), fill=255, width=3)
            (folder / name).mkdir(parents=True, exist_ok=True)
            image.save(folder / name / f"{i}.png")
    return folder


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(bool(LACKING), reason=f"not installed: {', '.join(LACKING)}")
def test_a_wheel_trains_learns_and_predicts(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "1", "COLUMNS": "100"}
    home = tmp_path / "environment"
    scripts = home / ("Scripts" if os.name == "nt" else "bin")

    def call(*command, cwd=tmp_path):
        done = subprocess.run(
            list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return done

    call(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "wheel", cwd=ROOT)
    (wheel,) = (tmp_path / "wheel").glob("pgp_hf-*.whl")
    venv.create(home, with_pip=False, symlinks=os.name != "nt")
    call(
        *(
            sys.executable,
            "-m",
            "pip",
            "--python",
            scripts / "python",
            "install",
            "--quiet",
            "--no-deps",
            "--no-index",
        ),
        *("--disable-pip-version-check", wheel),
    )
    (packages,) = home.glob("lib/python*/site-packages") if os.name != "nt" else [home / "Lib" / "site-packages"]
    paths = {sysconfig.get_paths()[name] for name in ("purelib", "platlib")} | {
        path for path in sys.path if path.endswith("site-packages")
    }
    (packages / "dependencies.pth").write_text("\n".join(sorted(paths)))  # a plain path: nothing editable comes along
    place = call(scripts / "python", "-c", "import pgp_hf; print(pgp_hf.__file__)").stdout
    assert Path(place.strip()).is_relative_to(home)

    command = scripts / "pgp-hf"
    assert call(command, "--version").stdout.startswith("pgp-hf ")
    trained = call(command, "train", "l2p", "--num_tasks", "3", *FEW)
    assert (tmp_path / "out" / "l2p_pgp" / "task-3").is_dir() and "out/l2p_pgp" in trained.stdout
    lines = trained.stdout.splitlines() + trained.stderr.splitlines()
    assert "Warning" not in trained.stderr and [line for line in lines if len(line) > 100] == []
    assert "\r" not in trained.stdout + trained.stderr  # no bar without a terminal
    learned = call(
        *(command, "learn", "out/l2p_pgp", "--train_dir", photos(tmp_path / "photos"), "--output_dir", "out/more"),
        *("--num_train_epochs", "1"),
    )
    assert "new    task 4: cross, ring" in learned.stdout
    told = call(command, "predict", "out/more", "photos", "--top_k", "12", "--json_lines").stdout.splitlines()
    assert len(told) == 20
    names = {label["label"] for line in told for label in json.loads(line)["predictions"]}
    assert len(names) == 12 and {"cross", "ring", "seven"} <= names
    for other in ("presets", "convert --help", "demo --help", "push --help", "train baseline --help"):
        assert call(command, *other.split()).stdout
