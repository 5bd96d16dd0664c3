<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="NiReports: https://www.nipreps.org/">
<title>{{ title }}</title>
{{ assets }}
</head>
<body>
<a class="visually-hidden-focusable" href="#content">Skip to the report</a>
<nav class="navbar fixed-top navbar-expand bg-light" aria-label="Sections of the report">
<ul class="navbar-nav container-fluid flex-wrap justify-content-start">
{% for section in sections %}
{% if section.isnested %}
<li class="nav-item dropdown">
<a class="nav-link dropdown-toggle" role="button" data-bs-toggle="dropdown" aria-expanded="false" href="#{{ section.name }}">{{ section.name }}</a>
<ul class="dropdown-menu">
{% for part in section.reportlets if part.title %}
<li><a class="dropdown-item" href="#{{ part.name }}">{{ part.title }}</a></li>
{% endfor %}
</ul>
</li>
{% else %}
<li class="nav-item"><a class="nav-link" href="#{{ section.name }}">{{ section.name }}</a></li>
{% endif %}
{% endfor %}
</ul>
</nav>
<main id="content">
<h1>{{ title }}</h1>
{% for section in sections %}
<section id="{{ section.name }}" aria-label="{{ section.name }}">
<h2 class="sub-report-title">{{ section.name }}</h2>
{% for part in section.reportlets %}
<div id="{{ part.name }}" class="part">
{% if part.title %}<h3 class="sub-report-group">{{ part.title }}</h3>{% endif %}
{% if part.subtitle %}
{% if section.isnested %}<h4 class="run-title">{{ part.subtitle }}</h4>{% else %}<h3 class="run-title">{{ part.subtitle }}</h3>{% endif %}
{% endif %}
{% for content, caption in part.components %}
{% if caption %}<p class="elem-caption">{{ caption }}</p>{% endif %}
{{ content }}
{% endfor %}
</div>
{% endfor %}
</section>
{% endfor %}
</main>
</body>
</html>
