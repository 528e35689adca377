"""The commands of a site's owner, `fedloom site ...`: what the owner decides at home, without a server."""

from __future__ import annotations

import select
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedloom.cli.console import out, print_json
from fedloom.cli.options import AsJson
from fedloom.core.errors import Refused

if TYPE_CHECKING:
    from fedloom.deploy.site.consent import Consents, OfferedTerms
    from fedloom.deploy.site.settings import Site

site_app = typer.Typer(no_args_is_help=True, help="What a site's owner decides at home.")

Config = Annotated[Path, typer.Option("--config", metavar="FILE", help="The site's settings, site.toml.")]


@site_app.command()
def new_split(config: Config) -> None:
    """Draw a new split: a new secret, by which other rows are held out from now on.

    Rows that were held out so far may be trained on from then on, so a later score says less. It is for a site whose secret is lost.
    """
    from fedloom.deploy.site.settings import read_site
    from fedloom.deploy.site.site_secret import begin_new_split

    begin_new_split(read_site(config).folder)
    out.print("A new split: rows held out so far may be trained on from now on.", soft_wrap=True)


@site_app.command("terms")
def show_terms(config: Config, as_json: AsJson = False) -> None:
    """Show the terms that servers have offered: open ones in full, accepted ones by their hash."""
    from fedloom.deploy.site.settings import read_site

    site = read_site(config)
    documents = _consents(site).documents()
    if as_json:
        print_json({"terms": documents})
        return
    for one in documents:
        if one.accepted:
            out.print(f"Accepted {one.hash} {one.terms.run}, {one.accepted}, {one.by}", soft_wrap=True)
    waiting = [one for one in documents if not one.accepted]
    for one in waiting:
        _show(site, one)
        out.print(f"Accept   fedloom site accept --config {config} {one.hash[:12]}", soft_wrap=True)
    if not waiting:
        out.print("No open terms.")


@site_app.command()
def accept(
    config: Config,
    name: Annotated[str, typer.Argument(metavar="HASH", help="The document's hash, at least its first 12 digits.")],
) -> None:
    """Accept terms that a server offered. The site then does what they say, as far as its limits allow it too."""
    from fedloom.deploy.site.settings import read_site

    site = read_site(config)
    accepted = _consents(site).accept(name, "fedloom site accept")
    _show(site, accepted)
    out.print(f"Accepted {accepted.hash} of {accepted.terms.run}", soft_wrap=True)


@site_app.command("log")
def show_record(
    config: Annotated[Path | None, typer.Option("--config", metavar="FILE", help="The site's settings.")] = None,
    record: Annotated[
        Path | None, typer.Option("--record", metavar="FILE", help="A copy of a site's record, for an auditor.")
    ] = None,
    keys: Annotated[
        list[Path] | None,
        typer.Option("--key", metavar="PUB", help="The site's public key; may be repeated. (default: of `key`)"),
    ] = None,
    head: Annotated[str, typer.Option("--head", metavar="HASH", help="A head that was stored before.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print the lines as they are, in JSON.")] = False,
    last: Annotated[int, typer.Option("--last", min=0, metavar="N", help="Lines to show; 0: all.")] = 40,
) -> None:
    """Show what servers asked of this site and what it sent, and verify that no line was changed.

    The lines are a hash chain, and each is signed by the site's key. Lines that are removed from the end leave no trace in the
    file: store the head elsewhere now and then, and give it with [bold]--head[/bold]. A record that fails the check gives exit
    code 2.

    Example: [bold]fedloom site log --record record.jsonl --key ward-7.pub[/bold]
    """
    from fedloom.cli.record_view import print_record
    from fedloom.deploy.site.site_key import read_private_key, read_site_key

    public = [read_site_key(key) for key in keys or []]
    if config is not None:
        from fedloom.deploy.site.settings import read_site

        site = read_site(config)
        record = record or site.folder / "record.jsonl"
        if site.key is not None and site.key.exists():
            public.append(read_private_key(site.key).public_key())
    if record is None:
        raise Refused("--config", "", "name the site's settings, or a copy of its record with --record")
    print_record(record, public, head, as_json, last)


@dataclass(slots=True)
class TermsPrompt:
    """What `fedloom join` shows of terms that are offered, and how they are accepted there. The worker never accepts any.

    Fields:
        site: the site.
        config: its settings.
        accept: whether the first terms that are offered from now on are accepted.
        since: when it began (s since 1970).
        shown: hashes of the documents that were shown.
        asked: the document that the terminal was asked about ("": none).
        stamps: when the files of the documents were written, at the last look (ns).
    """

    site: Site
    config: Path
    accept: bool = False
    since: float = field(default_factory=time.time)
    shown: set[str] = field(default_factory=set)
    asked: str = ""
    stamps: tuple[int, ...] = ()

    def look(self) -> None:
        """Show what was offered since the last time, and accept what is to be."""
        consents = _consents(self.site)
        if self.asked:
            self._hear(consents)
        stamps = consents.stamps()
        if stamps == self.stamps:
            return
        self.stamps = stamps
        for one in reversed(consents.documents()):
            if one.accepted or one.hash in self.shown or one.offered < self.since:
                continue
            self.shown.add(one.hash)
            _show(self.site, one)
            if self.accept and not consents.changes(one.terms):
                self.accept = False
                self._accept(consents, one.hash, "fedloom join --accept")
            elif is_terminal() and not self.asked:
                self.asked = one.hash
                out.print(f"Accept the terms {one.hash[:12]}? y/N")
            else:
                command = f"fedloom site accept --config {self.config} {one.hash[:12]}"
                out.print(f"Nothing is done under these terms until they are accepted: {command}", soft_wrap=True)

    def _hear(self, consents: Consents) -> None:
        """Take what was typed, if anything was."""
        if not select.select([sys.stdin], [], [], 0)[0]:
            return
        typed, name, self.asked = sys.stdin.readline().strip().lower(), self.asked, ""
        if typed in ("y", "yes"):
            self._accept(consents, name, "the terminal of fedloom join")
        else:
            out.print(f"Not accepted. Later: fedloom site accept --config {self.config} {name[:12]}", soft_wrap=True)

    def _accept(self, consents: Consents, name: str, by: str) -> None:
        consents.accept(name, by)
        out.print(f"Accepted {name}", soft_wrap=True)


def is_terminal() -> bool:
    """Return whether somebody may type an answer."""
    return sys.stdin.isatty()


def _consents(site: Site) -> Consents:
    from fedloom.deploy.site.consent import Consents

    return Consents(site.folder, site.terms.accepted)


def _show(site: Site, offered: OfferedTerms) -> None:
    from fedloom.deploy.site.consent import terms_lines

    changes = [] if offered.accepted else _consents(site).changes(offered.terms)
    for line in terms_lines(offered.terms, site.limits, changes):
        out.print(line, soft_wrap=True)
