{{/* What the pods of a trainer on Ray have in common. */}}

{{/* Of deploy/locks/ray.txt, which the image has. */}}
{{- define "offbeat.rayVersion" -}}
2.60.0
{{- end }}

{{/* of `ray start`; KubeRay adds addresses. Nothing of ours lies in the object store: this is near the least that Ray allows. */}}
{{- define "offbeat.rayStart" -}}
node-manager-port: "6380"  # else a random one, which no probe could ask
object-store-memory: "83886080"
disable-usage-stats: "true"
{{- end }}

{{/* (root, component) */}}
{{- define "offbeat.rayMetadata" -}}
labels:
  {{- include "offbeat.labels" . | nindent 2 }}
annotations:
  cluster-autoscaler.kubernetes.io/safe-to-evict: "false"
{{- end }}

{{/* (root, component, values): spec of a pod, but for containers and volumes */}}
{{- define "offbeat.rayPod" -}}
{{- include "offbeat.placement" . | nindent 0 }}
securityContext:
  {{- include "offbeat.podSecurity" 10001 | nindent 2 }}
terminationGracePeriodSeconds: {{ .root.Values.trainer.terminationGraceSeconds }}
{{- end }}

{{/* (root, component) */}}
{{- define "offbeat.rayContainer" -}}
image: {{ include "offbeat.image" . | quote }}
imagePullPolicy: {{ .root.Values.image.pullPolicy }}
securityContext:
  {{- include "offbeat.containerSecurity" . | nindent 2 }}
volumeMounts:
  {{- include "offbeat.trainerMounts" . | nindent 2 }}
{{- end }}

{{/* root. Who reaches Ray's ports can run programs: it asks for the token of the fleet. */}}
{{- define "offbeat.rayEnvironment" -}}
- {name: RAY_AUTH_MODE, value: token}
- {name: RAY_AUTH_TOKEN_PATH, value: /run/secrets/offbeat/cluster-token}
- {name: RAY_USAGE_STATS_ENABLED, value: "0"}
{{ include "offbeat.trainerEnvironment" . }}
{{- end }}

{{/* port that Ray listens on. KubeRay's own probes ask the dashboard, which the image does not have. */}}
{{- define "offbeat.rayProbes" -}}
startupProbe:
  tcpSocket: {port: {{ . }}}
  periodSeconds: 5
  failureThreshold: 60
livenessProbe:
  tcpSocket: {port: {{ . }}}
  periodSeconds: 10
  timeoutSeconds: 5
  failureThreshold: 6
readinessProbe:
  tcpSocket: {port: {{ . }}}
  periodSeconds: 5
  timeoutSeconds: 5
{{- end }}
