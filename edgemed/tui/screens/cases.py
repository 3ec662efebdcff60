"""The list of cases: search, open, new, rename, delete."""

from __future__ import annotations

from rich.text import Text
from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding
from textual.widgets import DataTable, Footer, Input, Static

from edgemed.clinic.records import Case
from edgemed.core.errors import EdgemedError
from edgemed.core.text import one_line
from edgemed.tui.dialogs import ConfirmDialog, TextDialog
from edgemed.tui.i18n import N_, _
from edgemed.tui.screens.base import ChatScreen
from edgemed.tui.status import StatusBar
from edgemed.tui.texts import say_error, say_time


class CaseListScreen(ChatScreen):
    """All cases, the one changed last on top."""

    DEFAULT_CSS = """
    CaseListScreen #heading { color: $primary; text-style: bold; padding: 0 1; height: 1; }
    CaseListScreen #search { height: 3; }
    CaseListScreen DataTable { height: 1fr; background: $background; }
    CaseListScreen #empty { padding: 1 2; color: $quiet; height: auto; display: none; }
    """
    BINDINGS = [
        Binding("n", "new", N_("New")),
        Binding("r", "rename", N_("Rename")),
        Binding("d,delete", "delete", N_("Delete")),
        Binding("slash", "search", N_("Search")),
        Binding("f2", "settings", N_("Settings")),
        Binding("escape", "table", "", show=False),
    ]

    def __init__(self) -> None:
        super().__init__()
        self._shown: list[Case] | None = None

    def compose(self) -> ComposeResult:
        yield Static(_("Cases"), id="heading", markup=False)
        yield Input(placeholder=_("Search in labels, messages, reports and patients"), id="search")
        yield DataTable(cursor_type="row", zebra_stripes=False)
        yield Static("", id="empty", markup=False)
        yield StatusBar(markup=False)
        yield Footer(show_command_palette=False)

    def on_mount(self) -> None:
        super().on_mount()
        table = self.query_one(DataTable)
        for title, width in ((_("Case"), 20), (_("Images"), 7), (_("Messages"), 8), (_("Changed"), 16), (_("Report"), 8)):
            table.add_column(title, width=width)
        table.focus()

    def on_resize(self, event: events.Resize) -> None:
        table = self.query_one(DataTable)
        label, *others = table.ordered_columns
        taken = sum(column.get_render_width(table) for column in others) + 2 * table.cell_padding
        label.width = max(event.size.width - taken - table.scrollbar_size_vertical, 12)
        table.refresh(layout=True)

    def on_screen_resume(self) -> None:
        self.go(self._load(), group="load", exclusive=True)

    async def _load(self) -> None:
        search = self.query_one("#search", Input).value.strip()
        cases = await self.offload(self.chat.store.list_cases, search)
        table = self.query_one(DataTable)
        if cases != self._shown:  # rows that are taken away under a pressed key would swallow it
            self._fill(table, cases)
        empty = self.query_one("#empty", Static)
        empty.update(_("No case matches.") if search else _("No cases yet. Press N to make one."))
        empty.display = not cases

    def failed(self, error: EdgemedError) -> None:
        if self._shown is None:  # an empty list would say that there are no cases
            empty = self.query_one("#empty", Static)
            empty.update(say_error(error))
            empty.display = True
        super().failed(error)

    def _fill(self, table: DataTable[Text], cases: list[Case]) -> None:
        self._shown = cases
        row = table.cursor_row
        table.clear()
        for case in cases:
            table.add_row(*_cells(case), key=case.id)
        table.move_cursor(row=min(row, max(len(cases) - 1, 0)))

    @on(Input.Changed, "#search")
    def _typed(self) -> None:
        self.go(self._load(), group="load", exclusive=True)

    @on(Input.Submitted, "#search")
    def action_table(self) -> None:
        """Back to the list."""
        self.query_one(DataTable).focus()

    def action_search(self) -> None:
        """To the search line."""
        self.query_one("#search").focus()

    @on(DataTable.RowSelected)
    def _selected(self, event: DataTable.RowSelected) -> None:
        if event.row_key.value is not None:
            self._open(event.row_key.value)

    def _open(self, case_id: str) -> None:
        from edgemed.tui.screens.case import CaseScreen

        self.app.push_screen(CaseScreen(case_id))

    def _current(self) -> str | None:
        table = self.query_one(DataTable)
        if not table.row_count:
            return None
        return table.coordinate_to_cell_key(table.cursor_coordinate).row_key.value

    def action_new(self) -> None:
        """Ask for a label, make a case, open it."""
        self.go(self._new())

    async def _new(self) -> None:
        text = _("A short name of your own for this case, not the patient's name.")
        label = await self.app.push_screen_wait(TextDialog(_("New case"), text, accept=_("Create")))
        if label:
            case = await self.offload(self.chat.store.create_case, one_line(label))
            self._open(case.id)

    def action_rename(self) -> None:
        """Give the case another label."""
        if (case_id := self._current()) is not None:
            self.go(self._rename(case_id))

    async def _rename(self, case_id: str) -> None:
        case = await self.offload(self.chat.store.load_case, case_id)
        label = await self.app.push_screen_wait(TextDialog(_("Rename case"), _("New label:"), one_line(case.label)))
        if label:
            await self.offload(self.chat.store.rename_case, case_id, one_line(label))
            await self._load()

    def action_delete(self) -> None:
        """Delete a case for good, after a question."""
        if (case_id := self._current()) is not None:
            self.go(self._delete(case_id))

    async def _delete(self, case_id: str) -> None:
        case = await self.offload(self.chat.store.load_case, case_id)
        text = _("{label}: its images, conversation and reports are removed for good.").format(label=one_line(case.label))
        if await self.app.push_screen_wait(ConfirmDialog(_("Delete this case?"), text, _("Delete"), danger=True)):
            await self.offload(self.chat.store.delete_case, case_id)
            self.chat.drafts.pop(case_id, None)
            await self._load()

    def _renew(self) -> None:
        """The same list in the new language."""
        self.app.switch_screen(CaseListScreen())

    def action_settings(self) -> None:
        """Language, look, auto-lock."""
        from edgemed.tui.screens.settings import SettingsScreen

        def changed(saved: bool | None) -> None:
            if saved:
                self.call_later(self._renew)  # once the box has gone

        self.app.push_screen(SettingsScreen(), changed)


def _cells(case: Case) -> tuple[Text, ...]:
    report = Text(_("signed") if case.signed else "")
    return Text(one_line(case.label)), Text(str(case.images)), Text(str(case.messages)), Text(say_time(case.changed)), report
