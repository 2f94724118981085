"""Reports drawn for a terminal, as Markdown and as HTML pages: functions over values."""
