"""The picture of `memplan report` in the docs: `python benchmarks/pictures.py`. Plans, trains a step, photographs.

Model, batch and budget are those of `examples/01_autofit.py`. Takes Chromium and playwright.
"""

import os
import shutil
import tempfile
from pathlib import Path

import torch
from playwright.sync_api import sync_playwright
from transformers import LlamaConfig, LlamaForCausalLM

import memplan
from memplan.report.page import page_html

DOCS = Path(__file__).resolve().parents[1] / "docs"
BUDGET, BATCH, LENGTH = "460MiB", 2, 512


def main() -> None:
    os.environ["MEMPLAN_CACHE"] = "off"  # what earlier runs taught is not in the picture
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1408, "num_attention_heads": 8, "num_key_value_heads": 4}
    config = LlamaConfig(**shape, num_hidden_layers=8, vocab_size=256, max_position_embeddings=LENGTH, use_cache=False)
    ids = torch.randint(256, (BATCH, LENGTH))
    model, sample = LlamaForCausalLM(config).train(), {"input_ids": ids, "labels": ids}
    fit = memplan.autofit(model, f"cpu:{BUDGET}", sample=sample, effective_batch=BATCH)
    print(fit.plan.describe(), fit.measured.describe(), sep="\n")
    photograph(page_html(fit.plan, fit.measured), DOCS / "report.png")


def photograph(html: str, path: Path) -> None:
    """A page down to the table of its blocks, in light colours, as a laptop shows it."""
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        page_file = Path(folder) / "report.html"
        page_file.write_text(html, encoding="utf-8")
        with driver.chromium.launch(executable_path=shutil.which("chromium")) as browser:
            page = browser.new_page(viewport={"width": 1100, "height": 1000})
            page.goto(page_file.as_uri())
            shown = page.locator(".plan:visible").bounding_box()
            page.screenshot(
                path=path,
                full_page=True,
                clip={"x": 0, "y": 0, "width": 1100, "height": shown["y"] + shown["height"]},
            )
    print(f"wrote {path}, {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
