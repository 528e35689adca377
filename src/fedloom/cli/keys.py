"""`fedloom keys ...`: the certificate of a server and the keys of its sites."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.console import out, print_json
from fedloom.cli.options import AsJson, ServerFolder

keys_app = typer.Typer(
    no_args_is_help=True, help="Manage access: the server's certificate, and the keys of authorised sites."
)

Hosts = Annotated[
    list[str],
    typer.Option(
        "--host", metavar="NAME", help="Host name or address by which sites reach the server; may be repeated."
    ),
]
Days = Annotated[int, typer.Option("--days", metavar="N", min=1, help="Days until the server's certificate ends.")]


@keys_app.command("new")
def keys_new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")], hosts: Hosts, days: Days = 397
) -> None:
    """Make a certificate authority and the server's certificate, at the server."""
    from fedloom.deploy.flower import keys

    certificate = keys.new(folder, hosts, days)
    out.print(f"Give     {certificate} to every site (it is no secret)", soft_wrap=True)
    out.print(f"Ends     {keys.expiry(folder / 'keys' / 'server.crt'):%Y-%m-%d}; fedloom keys renew makes a new one")


@keys_app.command("renew")
def keys_renew(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")], hosts: Hosts, days: Days = 397
) -> None:
    """Make a new certificate, at the server; sites need nothing new. Restart the server afterwards."""
    from fedloom.deploy.flower import keys

    out.print(f"Ends     {keys.expiry(keys.renew(folder, hosts, days)):%Y-%m-%d}")


@keys_app.command("site")
def keys_site(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the site is called.")],
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to put the two halves.")] = Path(),
) -> None:
    """Make the key of a site, at the site."""
    from fedloom.deploy.flower import keys

    private, public = keys.site(name, folder)
    out.print(f"Keep     {private} (secret)", soft_wrap=True)
    out.print(
        f"Send     {public} to the server, for: fedloom keys add {public.name} --name {name} --folder DIR",
        soft_wrap=True,
    )


@keys_app.command("add")
def keys_add(
    public: Annotated[Path, typer.Argument(metavar="PUB", help="The public half of a site's key.")],
    name: Annotated[str, typer.Option("--name", metavar="NAME", help="What the server calls the site.")],
    folder: ServerFolder,
    region: Annotated[bool, typer.Option("--region", help="It is the key of a region, not of a site.")] = False,
    examples: Annotated[
        int | None,
        typer.Option(
            "--examples",
            metavar="N",
            help="Examples that count for it. Left out: what it registers, at most three times the median of all.",
        ),
    ] = None,
) -> None:
    """Authorise a site at the server. A running server needs no restart."""
    from fedloom.deploy.flower import keys
    from fedloom.deploy.server.key_facts import KeyFacts

    entry = keys.add(public, name, folder, KeyFacts(region, examples))
    who = f"the region {entry.name}" if region else entry.name
    out.print(f"Authorised {who}, with key {entry.fingerprint}", soft_wrap=True)


@keys_app.command("remove")
def keys_remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The site, as the server calls it.")], folder: ServerFolder
) -> None:
    """Revoke a site at the server: it can no longer connect. To come back it needs a new key."""
    from fedloom.deploy.flower import keys

    keys.remove(name, folder)
    out.print(f"Revoked {name}: it can no longer connect")


@keys_app.command("list")
def keys_list(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")], as_json: AsJson = False
) -> None:
    """List the authorised sites and the fingerprints of their keys, at the server."""
    from fedloom.deploy.flower import keys

    listed = keys.listed(folder)
    if as_json:
        print_json({"sites": [{"name": entry.name, "fingerprint": entry.fingerprint} for entry in listed]})
        return
    width = max((len(entry.name) for entry in listed), default=0)
    for entry in listed:
        out.print(f"{entry.name:{width}} {entry.fingerprint}", soft_wrap=True)
    if not listed:
        out.print(
            f"No site is authorised. Add one with: fedloom keys add PUB --name NAME --folder {folder}", soft_wrap=True
        )
