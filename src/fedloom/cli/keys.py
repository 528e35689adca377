"""`fedloom keys`: who may speak."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

out = Console(highlight=False)

Hosts = Annotated[
    list[str],
    typer.Option(
        "--host", metavar="NAME", help="Host name or address by which sites reach the server; may be repeated."
    ),
]
Days = Annotated[int, typer.Option("--days", min=1, help="Days until the server's certificate ends.")]
Of = Annotated[Path, typer.Option("--folder", metavar="DIR", help="The server's folder.")]

keys_app = typer.Typer(no_args_is_help=True, help="Who may speak: the server's certificate, the sites' keys.")


@keys_app.command("new")
def keys_new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")], hosts: Hosts, days: Days = 397
) -> None:
    """At the server: make a certificate authority and the server's certificate."""
    from fedloom.deploy.flower import keys

    certificate = keys.new(folder, hosts, days)
    out.print(f"Give     {certificate} to every site (it is no secret)", soft_wrap=True)
    out.print(f"Ends     {keys.expiry(folder / 'keys' / 'server.crt'):%Y-%m-%d}; fedloom keys renew makes a new one")


@keys_app.command("renew")
def keys_renew(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")], hosts: Hosts, days: Days = 397
) -> None:
    """At the server: a new certificate; sites need nothing new. Restart the server after it."""
    from fedloom.deploy.flower import keys

    out.print(f"Ends     {keys.expiry(keys.renew(folder, hosts, days)):%Y-%m-%d}")


@keys_app.command("site")
def keys_site(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the site is called.")],
    folder: Annotated[Path, typer.Option("--out", metavar="DIR", help="Where to put the two halves.")] = Path(),
) -> None:
    """At a site: make its key."""
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
    name: Annotated[str, typer.Option("--name", help="What the server calls the site.")],
    folder: Of,
) -> None:
    """At the server: let a site in. A server that runs needs no restart."""
    from fedloom.deploy.flower import keys

    entry = keys.add(public, name, folder)
    out.print(f"{entry.name} may come, with key {entry.fingerprint}", soft_wrap=True)


@keys_app.command("remove")
def keys_remove(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The site, as the server calls it.")], folder: Of
) -> None:
    """At the server: let a site in no longer. If it is to come back, it needs a new key."""
    from fedloom.deploy.flower import keys

    keys.remove(name, folder)
    out.print(f"{name} may come no longer")


@keys_app.command("list")
def keys_list(folder: Annotated[Path, typer.Argument(metavar="DIR", help="The server's folder.")]) -> None:
    """At the server: the sites that may come."""
    from fedloom.deploy.flower import keys

    for entry in keys.listed(folder):
        out.print(f"{entry.name:20s} {entry.fingerprint}", soft_wrap=True)
