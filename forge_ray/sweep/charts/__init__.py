"""The report's figures as HTML fragments, by topic; the page brings plotly.js once."""
