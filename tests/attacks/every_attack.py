"""All attacks, by what attacks what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tests.attacks import faults, files, liars, network, region, server_against_site, turned_change
from tests.attacks.attack import Attack

ATTACKS: Mapping[str, Sequence[Attack]] = {
    "server against site": server_against_site.ATTACKS,
    "site against server": (*liars.ATTACKS, *turned_change.ATTACKS, *region.ATTACKS),
    "network": network.ATTACKS,
    "files": files.ATTACKS,
    "faults": faults.ATTACKS,
}
