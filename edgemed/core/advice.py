"""The sentences that stand beside every answer, whoever shows it: the command line, the terminal program, a report.

Plain English: the terminal program translates them, and no one else rewords them.
"""

from __future__ import annotations

ADVICE = "This answer advises and never replaces a clinician's judgement."
# Shown in place of trust where a calibrated model is too unsure of its own answer.
REFER = "The model is not sure enough of this answer. Refer the case to a specialist."
NOT_CALIBRATED = "How sure the model is was not measured (not calibrated)."
