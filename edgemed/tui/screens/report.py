"""The case's report: drafted by the model, edited here, signed with a name, exported."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import Vertical
from textual.css.query import NoMatches
from textual.widgets import Footer, Static, TextArea

from edgemed.clinic.records import Report
from edgemed.core.text import one_line, printable
from edgemed.tui.dialogs import ConfirmDialog, TextDialog
from edgemed.tui.i18n import N_, _, language
from edgemed.tui.reporting import ExportWish, draft_report, export_report
from edgemed.tui.screens.base import ChatScreen
from edgemed.tui.session import CaseSession
from edgemed.tui.status import StatusBar
from edgemed.tui.texts import advice, say_report

PARTS = ("findings", "impression", "recommendation")
# What a power cut may take of what was typed.
AUTOSAVE_S = 60.0


class ReportScreen(ChatScreen):
    """Three texts and where the report stands."""

    DEFAULT_CSS = """
    ReportScreen #heading { color: $primary; text-style: bold; padding: 0 1; height: 1; }
    ReportScreen #stand { padding: 0 1; height: auto; }
    ReportScreen #advice { color: $quiet; padding: 0 1; height: auto; }
    ReportScreen #parts { height: 1fr; }
    ReportScreen TextArea { height: 1fr; min-height: 4; border: round $quiet; background: $background; }
    ReportScreen TextArea:focus { border: round $primary; }
    ReportScreen #findings { height: 2fr; }
    """
    BINDINGS = [
        Binding("f5", "draft", N_("Draft")),
        Binding("ctrl+s", "save", N_("Save")),
        Binding("f9", "sign", N_("Sign")),
        Binding("f8", "export", N_("Export")),
        Binding("escape", "back", N_("Back")),
    ]

    def __init__(self, session: CaseSession) -> None:
        super().__init__()
        self.session = session
        self._report: Report | None = None
        self._shown: tuple[str, ...] = ("", "", "")
        self._drafting = False
        # One save or signature at a time: a save that comes after a signature would begin a new version.
        self._writing = asyncio.Lock()

    def compose(self) -> ComposeResult:
        yield Static(_("Report"), id="heading", markup=False)
        yield Static("", id="stand", markup=False)
        with Vertical(id="parts"):
            titles = (_("Findings"), _("Impression"), _("Recommendation"))
            for part, title in zip(PARTS, titles, strict=True):
                area = TextArea("", soft_wrap=True, show_line_numbers=False, tab_behavior="focus", id=part)
                area.border_title = title
                yield area
        yield Static(advice(), id="advice", markup=False)
        yield StatusBar(markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        super().on_mount()
        self.query_one("#findings").focus()
        self.go(self._load())
        self.set_interval(AUTOSAVE_S, self._autosave)

    async def _load(self) -> None:
        self._show(await self.offload(self.chat.store.load_report, self.session.case_id))

    def _show(self, report: Report | None) -> None:
        self._report = report
        signed = report is not None and bool(report.signed_by)
        self._shown = tuple(printable(getattr(report, part, "")) for part in PARTS)
        for part, text in zip(PARTS, self._shown, strict=True):
            area = self.query_one(f"#{part}", TextArea)
            area.load_text(text)
            area.read_only = signed
        stand = say_report(report)
        if signed:
            stand += " " + _("It can no longer be changed; F5 or Ctrl+S begins a new version.")
        self.query_one("#stand", Static).update(stand)

    # -- editing ------------------------------------------------------------------------------------------------------

    def _texts(self) -> tuple[str, ...]:
        return tuple(self.query_one(f"#{part}", TextArea).text for part in PARTS)

    @property
    def edited(self) -> bool:
        """Whether there is something that was typed and not saved."""
        return self._texts() != self._shown

    def unsaved(self) -> Callable[[], Report] | None:
        """How to save what was typed, if anything was; for whoever closes the screen."""
        if not self.edited:
            return None
        wanted, store = self._typed(), self.chat.store
        return lambda: store.save_report(wanted)

    def _typed(self) -> Report:
        base = self._report or Report(self.session.case_id)
        texts = dict(zip(PARTS, self._texts(), strict=True))
        return replace(base, **texts, edited=base.edited or self.edited, signed_by="", signed_at=None)  # type: ignore[arg-type]

    def action_save(self) -> None:
        """Keep what was typed; of a signed report, begin a new version."""
        self.go(self._save(), group="save", exclusive=True)

    async def _save(self) -> None:
        if self._report is not None and self._report.signed_by and not self.edited:
            self._begin_version(self._report)
            return
        async with self._writing:
            self._show(await self.offload(self.chat.store.save_report, self._typed()))
        self.chat.say(_("Saved."))

    def _autosave(self) -> None:
        with suppress(NoMatches):  # a lock takes the screen away part by part
            if self.chat.unlocked and not self._drafting and not self._writing.locked() and self.edited:
                self.go(self._save_quietly(), group="save")

    async def _save_quietly(self) -> None:
        """Keep what was typed; the texts and the cursor stay as they are."""
        async with self._writing:
            texts = self._texts()
            self._report = await self.offload(self.chat.store.save_report, self._typed())
            self._shown = texts
        self.query_one("#stand", Static).update(say_report(self._report))

    def _begin_version(self, signed: Report) -> None:
        """The signed text can be changed from now on; what is saved becomes a version of its own."""
        for part in PARTS:
            self.query_one(f"#{part}", TextArea).read_only = False
        self.query_one("#stand", Static).update(_("Draft {number}, not saved yet.").format(number=signed.version + 1))

    def action_draft(self) -> None:
        """Let the model write a draft from the conversation."""
        if not self._drafting:
            self.go(self._draft())

    async def _draft(self) -> None:
        if any(text.strip() for text in self._texts()):
            text = _("The three texts are replaced by a new draft.")
            if not await self.app.push_screen_wait(ConfirmDialog(_("Draft again?"), text, _("Draft"))):
                return
        self._set_drafting(True)
        try:
            self._show(await self.offload(draft_report, self.session, self.chat.store, language().code))
        finally:
            self._set_drafting(False)

    def _set_drafting(self, drafting: bool) -> None:
        self._drafting = drafting
        for area in self.query(TextArea):  # the draft takes the place of these texts: nobody is to type into them now
            area.read_only = drafting or bool(self._report and self._report.signed_by)
        for bar in self.query(StatusBar):
            bar.state = replace(bar.state, answering=drafting)
        for stand in self.query("#stand").results(Static):
            stand.update(_("The model is drafting. Escape stops it.") if drafting else say_report(self._report))

    # -- signing and exporting ----------------------------------------------------------------------------------------

    def action_sign(self) -> None:
        """Put a name under the report; it cannot be changed afterwards."""
        self.go(self._sign())

    async def _sign(self) -> None:
        if self._report is not None and self._report.signed_by and not self.edited:
            self.chat.say(say_report(self._report))
            return
        text = _("With your name you say that you have read and corrected this report. It cannot be changed afterwards.")
        name = await self.app.push_screen_wait(TextDialog(_("Sign the report"), text, accept=_("Sign"), hint=_("Your name and role")))
        if name:
            async with self._writing:
                if self._report is None or self.edited:
                    await self.offload(self.chat.store.save_report, self._typed())
                self._show(await self.offload(self.chat.store.sign_report, self.session.case_id, one_line(name)))

    def action_export(self) -> None:
        """Write files for others."""
        self.go(self._export())

    async def _export(self) -> None:
        from edgemed.tui.screens.export import ExportScreen

        if self.edited:
            await self._save()
        wish: ExportWish | None = await self.app.push_screen_wait(ExportScreen(signed=bool(self._report and self._report.signed_by)))
        if wish is not None:
            written = await self.offload(export_report, self.session, self.chat.store, replace(wish, language=language().code))
            names = ", ".join(one_line(path.name) for path in written)
            self.chat.say(_("Written to {folder}: {names}").format(folder=one_line(str(wish.folder)), names=names))

    def action_back(self) -> None:
        """Stop a draft; else save what was typed and go back."""
        if self._drafting:
            self.session.stop()
        elif (save := self.unsaved()) is not None:
            self.go(self._save_and_go(save))
        else:
            self.app.pop_screen()

    async def _save_and_go(self, save: Callable[[], Report]) -> None:
        await self.offload(save)
        self.app.pop_screen()
