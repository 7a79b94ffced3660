"""Report: a finished `Report` contract in; notebook card, HTML page, Markdown, text and Plotly figures out.

`metrics` and `sections` say what is shown, once; `card`, `page` and `markdown` only render it. Nothing is computed
here that is not in the report's JSON.
"""
