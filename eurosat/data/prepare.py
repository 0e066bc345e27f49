"""Tiles that a training can start from: packed, validated, split."""

import logging
from dataclasses import dataclass

from eurosat.config import TrainConfig
from eurosat.data import validation_record
from eurosat.data.pack import Pack, open_pack
from eurosat.data.split import Split, make_split

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedData:
    """Data that is packed, split, and validated or knowingly not."""

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
    """Open or build the pack, ask for its receipt, and make the split.

    Raises:
        DataError: the tiles cannot be used, or were not validated.
    """
    pack = open_pack(config.data)
    validation = validation_record.require_passed(pack.fingerprint, config.data)
    split = make_split(pack.table, *config.data.split_options)
    log.info(
        "%d tiles, %d classes, %d bands, data %s; %s split %s; %d exact, %d near duplicates kept "
        "together; validation %s",
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
