{{/* Names, labels and images. A component is one of redis, control-plane, reward-server, rollout-server, trainer, test. */}}

{{- define "offbeat.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}{{ else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* (root, component) */}}
{{- define "offbeat.selector" -}}
app.kubernetes.io/name: {{ .root.Chart.Name }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end }}

{{- define "offbeat.labels" -}}
{{ include "offbeat.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end }}

{{/* (root, component) -> name and labels of an object */}}
{{- define "offbeat.metadata" -}}
name: {{ include "offbeat.fullname" .root }}-{{ .component }}
namespace: {{ .root.Release.Namespace }}
labels:
  {{- include "offbeat.labels" . | nindent 2 }}
{{- end }}

{{/* (root, component): those that run a model come in variants */}}
{{- define "offbeat.image" -}}
{{- $image := .root.Values.image -}}
{{- $tag := $image.tag | default .root.Chart.AppVersion -}}
{{- if has .component (list "rollout-server" "trainer") }}{{ $tag = printf "%s-%s" $tag $image.variant }}{{ end -}}
{{- with $image.registry }}{{ . }}/{{ end }}{{ $image.repository }}/{{ .component }}:{{ $tag }}
{{- end }}

{{- define "offbeat.secret" -}}
{{- required "existingSecret is not set: name a Secret with the keys token, cluster-token and redis-password (the chart makes none, and none has a default)" .Values.existingSecret }}
{{- end }}

{{- define "offbeat.redisUrl" -}}
{{- if .Values.redis.builtIn }}redis://{{ include "offbeat.fullname" . }}-redis:6379/0{{ else }}{{ required "redis.builtIn is false: set redis.url to the address of the Redis that is to be used" .Values.redis.url }}{{ end }}
{{- end }}

{{/* (root, name): claim of storage.runs or storage.models */}}
{{- define "offbeat.claim" -}}
{{- (index .root.Values.storage .name).existingClaim | default (printf "%s-%s" (include "offbeat.fullname" .root) .name) }}
{{- end }}
