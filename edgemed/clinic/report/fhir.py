"""The report as a FHIR R4 DiagnosticReport, whole in itself: patient, signer, institution, models and observations are contained.

    resource = export_fhir(export)              # a dict; json.dumps(resource) is the file

Status: preliminary (a draft), final (signed), amended (a signed later version). The sections are Observations with DICOM's codes; each
answer of a model is an Observation of its own that stays preliminary, since nobody signs it, with the Device that gave it. The security
label AIAST and a tag say that a machine took part. Knows no server: whoever posts it replaces what is contained by its own references.
"""

from __future__ import annotations

import re
from datetime import datetime, timezone
from html import escape
from typing import Any
from uuid import NAMESPACE_OID, UUID, uuid5

from edgemed.clinic.records import ModelIdentity, PatientIdentity
from edgemed.clinic.report.clean import iso_date
from edgemed.clinic.report.coded import DCM_URI, LOINC_URI, REPORT, SECTION_TEXTS
from edgemed.clinic.report.contents import Contents, Say, Section, Turn, build_contents, say_in, seen_text, utc_text
from edgemed.clinic.report.export import Export
from edgemed.clinic.report.headings import Translate, is_right_to_left, same

Resource = dict[str, Any]
_STATUS = {"draft": "preliminary", "signed": "final", "amended": "amended"}
_GENDERS = {"M": "male", "F": "female", "O": "other"}
_EMPTY: tuple[Any, ...] = (None, "", [], {})
_TERMINOLOGY = "http://terminology.hl7.org/CodeSystem"
# FHIR's `string` knows space, tab and line breaks; a no-break space before a French colon is none of these.
_OTHER_SPACES = re.compile(r"[^\S \n]")


def export_fhir(export: Export, translate: Translate = same) -> Resource:
    """The DiagnosticReport as JSON-ready values, without any key whose value is empty."""
    contents, say = build_contents(export, translate), say_in(export, translate)
    devices = {model: f"device-{number}" for number, model in enumerate(contents.models, 1)}
    observations = _observations(contents, devices, say)
    resource: Resource = {
        "resourceType": "DiagnosticReport",
        "id": contents.reference,
        "meta": _meta(),
        "language": contents.language,
        "text": {"status": "generated", "div": _narrative(contents, say)},
        "contained": [*_people(contents), *(_device(model, name) for model, name in devices.items()), *observations],
        "identifier": [{"system": "urn:ietf:rfc:3986", "value": f"urn:uuid:{_report_uuid(contents)}"}],
        "basedOn": _accession(contents.identity),
        "status": _STATUS[contents.status],
        "category": [_concept(f"{_TERMINOLOGY}/v2-0074", "RAD", "Radiology")],
        "code": _concept(LOINC_URI, *REPORT) | {"text": _string(contents.title)},
        "subject": _reference("patient", contents.identity),
        "issued": _instant(contents.as_of),
        "performer": _reference_list("organization", contents.institution),
        "resultsInterpreter": _reference_list("signer", contents.signed_by),
        "result": [{"reference": f"#{one['id']}"} for one in observations],
        "imagingStudy": _study(contents.identity),
        "conclusion": next((_string(one.text) for one in contents.sections if one.key == "impression" and one.written), None),
    }
    return _without_empty(resource)


def _meta() -> Resource:
    ai = {"system": f"{_TERMINOLOGY}/v3-ObservationValue", "code": "AIAST", "display": "Artificial Intelligence asserted"}
    # Only here: what is contained may have no label of its own (constraint dom-5).
    return {"security": [ai], "tag": [{"display": "AI-assisted"}]}


def _report_uuid(contents: Contents) -> UUID:
    return uuid5(NAMESPACE_OID, f"edgemed report {contents.reference} {contents.version}")


def _without_empty(resource: Resource) -> Resource:
    """FHIR forbids empty strings, lists and objects: what is empty is not there."""
    kept = {key: _thinned(value) for key, value in resource.items()}
    return {key: value for key, value in kept.items() if value not in _EMPTY}


def _thinned(value: Any) -> Any:
    if isinstance(value, dict):
        return _without_empty(value)
    if isinstance(value, list):
        return [one for one in map(_thinned, value) if one not in _EMPTY]
    return value


def _string(text: str) -> str:
    return _OTHER_SPACES.sub(" ", text).strip()


def _instant(moment: datetime) -> str:
    return moment.astimezone(timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")


def _concept(system: str, code: str, display: str) -> Resource:
    return {"coding": [{"system": system, "code": code, "display": display}]}


def _reference(name: str, there: object) -> Resource | None:
    return {"reference": f"#{name}"} if there else None


def _reference_list(name: str, there: object) -> list[Resource]:
    return [{"reference": f"#{name}"}] if there else []


def _people(contents: Contents) -> list[Resource]:
    people: list[Resource] = []
    if contents.identity is not None:
        people.append(_patient(contents.identity))
    if contents.institution:
        people.append({"resourceType": "Organization", "id": "organization", "name": _string(contents.institution)})
    if contents.signed_by:
        people.append({"resourceType": "Practitioner", "id": "signer", "name": [{"text": _string(contents.signed_by)}]})
    return people


def _patient(identity: PatientIdentity) -> Resource:
    number = {"type": _concept(f"{_TERMINOLOGY}/v2-0203", "MR", "Medical record number"), "value": _string(identity.patient_id)}
    return {
        "resourceType": "Patient",
        "id": "patient",
        "identifier": [number] if identity.patient_id else [],
        "name": [_human_name(identity.name)],
        "gender": _GENDERS.get(identity.sex.upper(), ""),
        "birthDate": iso_date(identity.birth_date),
    }


def _human_name(name: str) -> Resource:
    """A DICOM name (family^given^middle^prefix^suffix) or a name as it was typed, which is only text."""
    alphabetic = name.split("=")[0]
    shown = {"text": _string(" ".join(name.replace("^", " ").split()))}
    if "^" not in alphabetic:
        return shown
    family, given, middle, prefix, suffix = ([*alphabetic.split("^"), "", "", "", ""])[:5]
    return shown | {
        "family": _string(family),
        "given": [_string(part) for part in (given, middle)],
        "prefix": [_string(prefix)],
        "suffix": [_string(suffix)],
    }


def _accession(identity: PatientIdentity | None) -> list[Resource]:
    if identity is None or not identity.accession:
        return []
    number = {"type": _concept(f"{_TERMINOLOGY}/v2-0203", "ACSN", "Accession ID"), "value": _string(identity.accession)}
    return [{"type": "ServiceRequest", "identifier": number}]


def _study(identity: PatientIdentity | None) -> list[Resource]:
    if identity is None or not re.fullmatch(r"[0-2](?:\.(?:0|[1-9]\d*))+", identity.study_uid):
        return []
    return [{"type": "ImagingStudy", "identifier": {"system": "urn:dicom:uid", "value": f"urn:oid:{identity.study_uid}"}}]


def _device(model: ModelIdentity, name: str) -> Resource:
    versions = [("Quantisation", model.quant), ("Manifest SHA-256", model.sha256)]
    return {
        "resourceType": "Device",
        "id": name,
        "deviceName": [{"name": _string(model.name), "type": "model-name"}] if model.name else [],
        "type": {"text": "Vision-language model (artificial intelligence); no medical device"},
        "version": [{"type": {"text": kind}, "value": _string(value)} for kind, value in versions if value],
        "note": [{"text": "It advises and never replaces a clinician."}],
    }


def _observations(contents: Contents, devices: dict[ModelIdentity, str], say: Say) -> list[Resource]:
    written = [_section(section, contents, devices) for section in contents.sections if section.written]
    answers: list[Resource] = []
    question = ""
    for turn in contents.turns:
        if turn.role == "user":
            question = turn.text
        elif _string(turn.text):
            answers.append(_answer(turn, question, f"answer-{len(answers) + 1}", contents, devices, say))
    return written + answers


def _section(section: Section, contents: Contents, devices: dict[ModelIdentity, str]) -> Resource:
    return {
        "resourceType": "Observation",
        "id": section.key,
        "status": _STATUS[contents.status],
        "code": _concept(DCM_URI, *SECTION_TEXTS[section.key]),
        "subject": _reference("patient", contents.identity),
        "issued": _instant(contents.as_of),
        "performer": _reference_list("signer", contents.signed_by),
        "valueString": _string(section.text),
        "device": _reference(devices[contents.drafted_by], True) if contents.drafted_by else None,
    }


def _answer(turn: Turn, question: str, name: str, contents: Contents, devices: dict[ModelIdentity, str], say: Say) -> Resource:
    seen = [seen_text(one, say) for one in turn.seen]
    return {
        "resourceType": "Observation",
        "id": name,
        "status": "preliminary",
        "code": {"text": _string(question) or say("answer")},
        "subject": _reference("patient", contents.identity),
        "valueString": _string(turn.text),
        "note": [{"text": _string(text)} for text in (*seen, *turn.notes, contents.advice)],
        "device": _reference(devices[turn.model], True) if turn.model else None,
    }


def _narrative(contents: Contents, say: Say) -> str:
    """The report for a person, as the XHTML that FHIR allows: no scripts, no links, nothing from outside but escaped text."""
    direction = ' dir="rtl"' if is_right_to_left(contents.language) else ""
    parts = [f"<h1>{_html(contents.title)}</h1>", f"<p><b>{_html(contents.status_text)}</b></p>"]
    rows = contents.patient_rows or ((say("patient"), say("withheld")),)
    parts.append(f"<p>{'<br/>'.join(f'{_html(label)}: {_html(value)}' for label, value in rows)}</p>")
    for section in contents.sections:
        parts.append(f"<h2>{_html(section.title)}</h2><p>{_html(section.text)}</p>")
    if contents.signed_at is not None:
        parts.append(f"<p>{_html(say('signed_by'))}: {_html(contents.signed_by)}, {utc_text(contents.signed_at)}</p>")
    parts.append(_html_list(say("images"), [f"{one.title}: {one.facts}; {one.view}" for one in contents.images]))
    parts.append(_html_list(say("views"), [seen_text(one, say) for turn in contents.turns for one in turn.seen]))
    parts.append(f"<h2>{_html(say('ai_title'))}</h2><p>{'<br/>'.join(map(_html, contents.ai_lines))}</p>")
    return f'<div xmlns="http://www.w3.org/1999/xhtml"{direction}>{"".join(parts)}</div>'


def _html_list(title: str, lines: list[str]) -> str:
    items = "".join(f"<li>{_html(line)}</li>" for line in dict.fromkeys(lines))
    return f"<h2>{_html(title)}</h2><ul>{items}</ul>" if items else ""


def _html(text: str) -> str:
    return escape(text).replace("\n", "<br/>")
