"""What `bench` prints for people: facts, a table of speeds, and what a peer could not do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from exporter.cli._console import note, print_facts, print_table, size

if TYPE_CHECKING:
    from exporter.bench.report import Speed, Spread
    from exporter.bench.run import PeerReport, Report
    from runtime.text_generation import TextGenerator

NOTHING = "-"
OURS = "this bundle"


def print_report(model: TextGenerator, report: Report, start_s: float | None) -> None:
    """Print it all."""
    manifest = model.bundle.manifest
    print_facts(
        [
            ("bundle", f"{model.bundle.path} ({manifest.target}, {manifest.precision})"),
            ("runs on", f"{model.backend}, {model.device}"),
            ("start", _start(model, report, start_s)),
            ("memory", f"{size(report.peak_bytes)} at its peak"),
            *((peer.contender.peer, _peer(peer)) for peer in report.peers),
            ("bandwidth", report.bandwidth and f"{size(report.bandwidth)}/s of memory read"),
        ]
    )
    print_table(_beside_peers(report) if report.peers else _alone(report))
    for peer in report.peers:
        for speed in peer.speeds:
            if speed.unable is not None:
                case = f"{speed.case.batch} × {speed.case.prompt_tokens} tokens"
                note(f"{peer.contender.peer}, {case}: not measured, {speed.unable}")
    click.echo(f"{report.new_tokens} new tokens a row; medians of {report.rounds} rounds (least–most)")


def _alone(report: Report) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [
        ("batch", "prompt", "first token", "prompt tokens/s", "tokens/s", "read per step", "roofline", "share")
    ]
    for speed in report.speeds:
        roofline = NOTHING if speed.roofline is None else f"{speed.roofline:.1f} tokens/s"
        read = NOTHING if speed.step_bytes is None else size(speed.step_bytes)
        rows.append((*_case(speed), *_figures(speed), read, roofline, _share(speed)))
    return rows


def _beside_peers(report: Report) -> list[tuple[str, ...]]:
    """Of each case our row, then the peers', with how many times as fast ours is."""
    rows: list[tuple[str, ...]] = [
        (
            *("batch", "prompt", "", "first token", "prompt tokens/s", "tokens/s", "share"),
            *("first token ×", "tokens/s ×", "same tokens"),
        )
    ]
    for number, own in enumerate(report.speeds):
        rows.append((*_case(own), OURS, *_figures(own), _share(own), "", "", ""))
        for peer in report.peers:
            speed = peer.speeds[number]
            ahead = (NOTHING,) * 3
            if speed.ahead is not None:
                against = speed.ahead
                ahead = (
                    *(f"{against.first_token.median:.2f}", f"{against.decode.median:.2f}"),
                    f"{100 * against.same_tokens:.0f} %",
                )
            rows.append(("", "", peer.contender.name, *_figures(speed), _share(speed), *ahead))
    return rows


def _case(speed: Speed) -> tuple[str, str]:
    return str(speed.case.batch), str(speed.case.prompt_tokens)


def _figures(speed: Speed) -> tuple[str, str, str]:
    """First token, tokens per second of the prompt, and of what follows."""
    first, prompt, rate = speed.first_token_s, speed.prompt_tokens_per_s, speed.tokens_per_s
    if first is None or prompt is None or rate is None:
        return (NOTHING,) * 3
    return _seconds(first), f"{prompt.median:.0f}", f"{rate.median:.1f} ({rate.least:.1f}–{rate.most:.1f})"


def _seconds(spread: Spread) -> str:
    return f"{spread.median:.3f} s ({spread.least:.3f}–{spread.most:.3f})"


def _share(speed: Speed) -> str:
    return NOTHING if speed.share is None else f"{100 * speed.share:.0f} %"


def _peer(peer: PeerReport) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in peer.contender.versions.items())
    told = [*filter(None, [versions, peer.contender.precision]), f"loaded in {peer.load_s:.2f} s"]
    return f"{', '.join(told)}, {size(peer.peak_bytes)} at its peak"


def _start(model: TextGenerator, report: Report, start_s: float | None) -> str:
    """From the command to the first token, by part."""
    parts = [("load", model.load_s - model.check_s), ("check", model.check_s), ("first token", report.cold_s)]
    if start_s is not None:
        parts.insert(0, ("imports", start_s))
    total = sum(seconds for _, seconds in parts)
    return f"{total:.2f} s: " + ", ".join(f"{name} {seconds:.2f}" for name, seconds in parts)
