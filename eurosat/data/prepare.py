"""Prepare tiles for training: pack, require validation, split."""

import logging
from dataclasses import dataclass

from eurosat.config import TrainConfig
from eurosat.data import validation_record
from eurosat.data.pack import Pack, open_pack
from eurosat.data.split import Split, make_split

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """A pack, its split, and whether the data set was validated."""

    pack: Pack
    split: Split
    validation: str
    """'passed', 'failed' or 'missing'."""

    @property
    def fingerprints(self) -> dict[str, str]:
        return {
            "data.fingerprint": self.pack.fingerprint,
            "split.fingerprint": self.split.fingerprint,
        }

    @property
    def tags(self) -> dict[str, str]:
        return self.fingerprints | {"data.validation": self.validation}


def prepare(config: TrainConfig) -> PreparedData:
    """Open or build the pack, check its validation record, and make the split.

    Raises:
        DataError: the tiles cannot be used, or were not validated.
    """
    pack = open_pack(config.data)
    validation = validation_record.require_passed(pack.fingerprint, config.data)
    split = make_split(pack.table, *config.data.split_options)
    log.info(
        "%d tiles, %d classes, %d bands, data %s; split %s %s; %d exact and %d near duplicates, "
        "each in the fold of its original; validation %s",
        len(pack.table),
        len(pack.classes),
        pack.bands,
        pack.fingerprint[:12],
        split.protocol,
        split.fingerprint[:12],
        pack.num_exact_duplicates,
        pack.num_near_duplicates,
        validation,
    )
    return PreparedData(pack=pack, split=split, validation=validation)
