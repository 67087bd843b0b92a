from __future__ import annotations

import pytest

from spire_hw.errors import InvalidInputError
from spire_hw.spiffeid import TrustDomain
from spire_hw_plugins.nodeattestor.pathtemplate import PathTemplate, Value

TD = TrustDomain("example.org")
DATA: dict[str, Value] = {
    "PluginName": "x509pop",
    "Fingerprint": "0f" * 20,
    "SerialNumber": 255,
    "Subject": {"CommonName": "Node-1.Example", "Organization": ["Acme", "Other"]},
    "URISanSelectors": {"rack": "r7"},
    "Empty": "",
}


# What Go's text/template with sprig makes of the same.
@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("/{{ .PluginName }}/{{ .Fingerprint }}", "/x509pop/" + "0f" * 20),
        ("/{{.PluginName}}", "/x509pop"),
        ("/cn/{{ .Subject.CommonName }}", "/cn/Node-1.Example"),
        ("/cn/{{ .Subject.CommonName | lower }}", "/cn/node-1.example"),
        ("/cn/{{ lower .Subject.CommonName }}", "/cn/node-1.example"),
        ('/{{ .Subject.CommonName | lower | trimSuffix ".example" }}', "/node-1"),
        ('/{{ .Subject.CommonName | replace "." "-" | upper }}', "/NODE-1-EXAMPLE"),
        ("/{{ trunc 4 .Subject.CommonName }}", "/Node"),
        ("/{{ trunc -7 .Subject.CommonName }}", "/Example"),
        ("/{{ substr 5 6 .Subject.CommonName }}", "/1"),
        ("/{{ substr 5 -1 .Subject.CommonName }}", "/1.Example"),
        ("/{{ index .Subject.Organization 1 }}", "/Other"),
        ('/{{ index .URISanSelectors "rack" }}', "/r7"),
        ("/{{ .URISanSelectors.rack }}/{{ .SerialNumber }}", "/r7/255"),
        ("/{{ lower (index .Subject.Organization 0) }}", "/acme"),
        ('/{{ .Empty | default "none" }}', "/none"),
        ('/{{ "x" | sha256sum | trunc 8 }}', "/2d711642"),
        ("/{{ sha1sum `x` }}", "/11f6ad8ec52a2984abaafd7c3b516503785c2072"),
        ('/{{ "a\\"b" | trimAll "a" }}', '/"b'),
        ("/a  {{- .PluginName -}}  /b", "/ax509pop/b"),
        ("/plain", "/plain"),
        ("", ""),
    ],
)
def test_templates(template: str, text: str) -> None:
    assert PathTemplate.parse(template).execute(DATA) == text


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("/{{ .PluginName", "not closed"),
        ("/.PluginName }}", "not closed"),
        ("/{{ }}", "not understood"),
        ("/{{ . }}", "not understood"),
        ("/{{ .A..B }}", "not understood"),
        ("/{{ .A | }}", "not understood"),
        ("/{{ | lower }}", "not understood"),
        ("/{{ .A .B }}", "not understood"),
        ("/{{ .A ) }}", "not understood"),
        ("/{{ (lower .A }}", "not understood"),
        ("/{{ $x := .A }}", "not understood"),
        ("/{{/* note */}}", "not understood"),
        ("/{{ 12abc }}", "not understood"),
        ("/{{ lowr .A }}", 'did you mean "lower"?'),
        ("/{{ if .A }}x{{ end }}", '"if" is not known'),
        ('/{{ env "HOME" }}', '"env" is not known'),
        ("/{{ .A | .B }}", "a pipe needs a function"),
        ("/{{ lower }}", "takes 1 arguments, found 0"),
        ("/{{ .A | lower .B }}", "takes 1 arguments, found 2"),
        ("/{{ " + "(" * 500 + " }}", "nested too deep"),
        ("/" + "x" * 3000, "longer than"),
    ],
)
def test_templates_that_cannot_be_used(template: str, words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        PathTemplate.parse(template)
    assert words in caught.value.message


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("/{{ .Nothing }}", 'no "Nothing"'),
        ("/{{ .fingerprint }}", 'did you mean "Fingerprint"?'),
        ("/{{ .PluginName.More }}", 'has no field "More"'),
        ("/{{ .URISanSelectors.shelf }}", 'no "shelf"'),
        ("/{{ .Subject.Organization }}", "use index"),
        ("/{{ lower .Subject.Organization }}", "use index"),
        ("/{{ index .Subject.Organization 7 }}", "out of range"),
        ("/{{ index .Subject.Organization -1 }}", "out of range"),
        ("/{{ index .PluginName 0 }}", "list or a map"),
        ('/{{ trunc "4" .PluginName }}', "needs a number"),
        ('/{{ .Fingerprint | replace "" "' + "x" * 1000 + '" }}', "more than"),
        ("/{{ .Fingerprint }}" * 100, "longer than"),
    ],
)
def test_nodes_a_template_does_not_fit(template: str, words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        PathTemplate.parse(template).execute(DATA)
    assert words in caught.value.message


def test_agent_id_lies_below_the_agents() -> None:
    made = PathTemplate.parse("/cn/{{ .Subject.CommonName }}").agent_id(TD, DATA)
    assert str(made) == "spiffe://example.org/spire/agent/cn/Node-1.Example"


@pytest.mark.parametrize(
    "name", ["", "a b", "..", ".", "a//b", "../../server", "a/", "ä", "a\n", "%2e%2e", "a?b"]
)
def test_a_name_cannot_lead_out_of_the_agents(name: str) -> None:
    with pytest.raises(InvalidInputError):
        PathTemplate.parse("/{{ .CN }}").agent_id(TD, {"CN": name})


def test_path_needs_a_slash() -> None:
    with pytest.raises(InvalidInputError, match="does not start with"):
        PathTemplate.parse("{{ .PluginName }}").agent_id(TD, DATA)
