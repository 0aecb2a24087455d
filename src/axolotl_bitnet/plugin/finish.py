"""The end of a run, on its first process: artifacts, their proof, the model card and the push."""

from __future__ import annotations

import logging
from pathlib import Path

from ..formats.registry import FORMATS
from ..model.fingerprint import Fingerprint
from ..run_folder import RUN_FILE
from ..storage.weight_bytes import weight_bytes
from ..verify.engines import consumer_of
from .args import BitNetConfig
from .artifacts import finish_run, made_in
from .card import write_card
from .hub import Repository, published

LOG = logging.getLogger("axolotl.bitnet")


def export_run(
    output_dir: Path, trained: Fingerprint, options: BitNetConfig, repository: Repository | None
) -> None:
    """Make what `bitnet.export` asks for, write it into the log and the model card, and push it.

    Raises:
        Exception: the first failure; what could be made is in place, and so are the latents.
    """
    with published(output_dir, repository):
        try:
            report = finish_run(output_dir, trained, options.export, options.verify)
        except Exception:
            _tell_failure(output_dir, options)
            raise
        finally:
            _card(output_dir, repository)
        latents = weight_bytes(output_dir) / 2**20
        for name, count in made_in(output_dir).items():
            LOG.info(
                "%s: %.1f MiB of latents are %.1f MiB in %s",
                name,
                latents,
                count / 2**20,
                output_dir / FORMATS[name].path,
            )
        if options.verify:
            LOG.info("%s", report.summary())
        for name in made_in(output_dir):
            LOG.info(
                "%s: not run in %s. To run it there: axolotl-bitnet verify %s",
                name,
                consumer_of(name),
                output_dir / FORMATS[name].path,
            )


def _tell_failure(output_dir: Path, options: BitNetConfig) -> None:
    made = made_in(output_dir)
    again = [
        f"axolotl-bitnet {entry.command} {output_dir} {output_dir / entry.path}"
        for name, entry in FORMATS.items()
        if name in options.export and name not in made
    ]
    LOG.error(
        "the ternary model could not be exported%s; the trained latents are saved in %s, and %s there has "
        "the error. Correct its cause, then run: %s",
        f" (but for {', '.join(made)})" if made else "",
        output_dir,
        RUN_FILE,
        "; ".join(again) or f"axolotl-bitnet verify {output_dir}",
    )


def _card(output_dir: Path, repository: Repository | None) -> None:
    """A card that fails is logged; the run goes on."""
    try:
        write_card(output_dir, list(made_in(output_dir)), repository.name if repository else None)
    except Exception as error:
        LOG.warning("the model card could not be written: %s", error)
