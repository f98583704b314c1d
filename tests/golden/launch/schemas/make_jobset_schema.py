"""Make `jobset_v1alpha2.json`, the JSON schema of a JobSet, from the API's published Python models.

    python -m pip install kubeflow-trainer-api==2.3.0
    python tests/golden/launch/schemas/make_jobset_schema.py

Source: the package kubeflow-trainer-api 2.3.0 (Apache License 2.0, The Kubeflow Authors), whose models of
``jobset.x-k8s.io/v1alpha2`` are generated from JobSet's OpenAPI definitions. Kept are the names, types and required
fields, and the values that a description lists; like an API server with strict validation, the schema refuses unknown
fields. Not kept: `metadata` and the Job template, which tests validate with the package kubernetes-validate.
"""

import json
import re
from pathlib import Path

PREFIX = "JobsetV1alpha2"
VALUES = re.compile(r"Valid values are ((?:\w+, )+\w+)\.")


def strict(node):
    """Return a part of the schema without texts, defaults and null, and without unknown fields."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    if "$ref" in node:
        name = node["$ref"].rpartition("/")[2]
        return {"$ref": f"#/$defs/{name}"} if name.startswith(PREFIX) else {"type": "object"}
    if "anyOf" in node:
        [option] = [option for option in node["anyOf"] if option != {"type": "null"}]
        return strict(option | {"description": node.get("description", "")})
    kept = {key: strict(value) for key, value in node.items() if key in ("type", "items", "required")}
    if "properties" in node:
        properties = {name: strict(value) for name, value in node["properties"].items()}
        kept |= {"properties": properties, "additionalProperties": False}
    if values := VALUES.search(node.get("description", "")):
        kept["enum"] = values[1].split(", ")
    return kept


def main() -> None:
    from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

    schema = JobsetV1alpha2JobSet.model_json_schema(by_alias=True)
    definitions = schema.pop("$defs")
    result = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$comment": "Made by make_jobset_schema.py from kubeflow-trainer-api 2.3.0 (Apache License 2.0).",
        **strict(schema),
        "$defs": {name: strict(node) for name, node in sorted(definitions.items()) if name.startswith(PREFIX)},
    }
    text = json.dumps(result, indent=1) + "\n"
    Path(__file__).with_name("jobset_v1alpha2.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
